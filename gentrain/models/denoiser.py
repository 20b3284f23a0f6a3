"""Denoiser: a network with its preconditioning, read as a prediction of x0, eps, v, velocity or score on its path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from gentrain.models.base import Condition
from gentrain.paths.base import Path, expand

Prediction = Literal["x0", "eps", "v", "velocity", "edm"]

_LEAST = 1e-5  # alpha and sigma are not taken below this where they are divided by


class Denoiser:
    """The network's own output is raw = a(t) x0 + b(t) eps, and x_t = alpha x0 + sigma eps: two equations, one call, any prediction.

    | prediction | raw                                                               |
    |------------|-------------------------------------------------------------------|
    | x0         | x0                                                                |
    | eps        | eps / path.eps_scale, which is 1 but for reflected_heat           |
    | v          | alpha eps - sigma x0 (arXiv:2202.00512)                           |
    | velocity   | d x_t / dt = alpha' x0 + sigma' eps                               |
    | edm        | F of EDM (arXiv:2206.00364, eq. 7): (sigma x0 / sigma_data - alpha sigma_data eps) / deviation |

    where deviation = sqrt(alpha^2 sigma_data^2 + sigma^2), that of x_t. "edm" on a path with alpha != 1 is EDM's preconditioning of
    x_t / alpha at noise level sigma / alpha, written so that nothing is divided by alpha or sigma. The network is given
    x_t / deviation with the prediction "edm", and on an unbounded path (variance exploding) whatever the prediction; else x_t itself.

    Limits: an x0 network says nothing of eps where sigma = 0, an eps network nothing of x0 where alpha = 0. For these two that sigma, that
    alpha counts as at least 1e-5, so that results stay finite: x_t may be amplified by at most 1e5. So does the score's 1 / sigma.

    Args:
        network: (x [B, ...], t [B], condition or None) -> [B, ...]; t is the path's `network_time`. Half precision results are made
            float32 before they are combined.
        path: that it was trained on.
        prediction: what the network predicts.

    In every method x_t is [B, ...], t is [B] in the path's time, the result [B, ...], and the network is called once.
    """

    def __init__(self, network: Callable[[Tensor, Tensor, Condition | None], Tensor], path: Path, prediction: Prediction):
        if prediction not in get_args(Prediction):
            raise ValueError(f"unknown prediction {prediction!r}; choose one of {', '.join(get_args(Prediction))}")
        self.network, self.path, self.prediction = network, path, prediction

    def raw(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The network's own output."""
        if self.prediction == "edm" or self.path.unbounded:
            x_t = x_t / expand(self._deviation(t), x_t)
        output = self.network(x_t, self.path.network_time(t), condition)
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What `raw` should be: a x0 + b eps."""
        a, b = self._coefficients(t)
        return expand(a, x0) * x0 + expand(b, x0) * eps

    def x0(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return self._combine(x_t, t, condition, torch.ones_like(t), torch.zeros_like(t))

    def eps(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return self._combine(x_t, t, condition, torch.zeros_like(t), torch.ones_like(t))

    def v(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return self._combine(x_t, t, condition, -self.path.sigma(t), self.path.alpha(t))

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return self._combine(x_t, t, condition, self.path.alpha_prime(t), self.path.sigma_prime(t))

    def score(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Gradient of log p_t(x_t): -eps / sigma."""
        return self._combine(x_t, t, condition, torch.zeros_like(t), -1 / self.path.sigma(t).clamp(min=_LEAST))

    def _combine(self, x_t: Tensor, t: Tensor, condition: Condition | None, c: Tensor, d: Tensor) -> Tensor:
        """c x0 + d eps, by solving the two equations for x0 and eps (Cramer's rule)."""
        raw = self.raw(x_t, t, condition)
        a, b = self._coefficients(t)
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        if self.prediction == "x0":
            sigma = sigma.clamp(min=_LEAST)
        elif self.prediction == "eps":
            alpha = alpha.clamp(min=_LEAST)
        determinant = alpha * b - sigma * a
        return expand((c * b - d * a) / determinant, x_t) * x_t + expand((d * alpha - c * sigma) / determinant, x_t) * raw

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of raw = a x0 + b eps."""
        path = self.path
        if self.prediction == "x0":
            return torch.ones_like(t), torch.zeros_like(t)
        if self.prediction == "eps":
            return torch.zeros_like(t), 1 / path.eps_scale(t)
        if self.prediction == "v":
            return -path.sigma(t), path.alpha(t)
        if self.prediction == "velocity":
            return path.alpha_prime(t), path.sigma_prime(t)
        deviation = self._deviation(t)
        return path.sigma(t) / (path.sigma_data * deviation), -path.alpha(t) * path.sigma_data / deviation

    def _deviation(self, t: Tensor) -> Tensor:
        """Standard deviation of x_t for data of deviation sigma_data."""
        return (self.path.alpha(t) ** 2 * self.path.sigma_data**2 + self.path.sigma(t) ** 2).sqrt()


def drop_condition(condition: Condition, rows: Tensor) -> Condition:
    """The condition with the null class, or the empty prompt, in `rows` ([B] bool)."""
    dropped = dict(condition)
    if "label" in condition:
        dropped["label"] = condition["label"].masked_fill(rows, -1)
    if "null" in condition:
        dropped["null"] = condition["null"] | rows
    return dropped
