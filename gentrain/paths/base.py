"""Probability path: the family of noisings x_t = alpha(t) x_0 + sigma(t) eps that a model learns to undo."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveFloat
from torch import Tensor

from gentrain.config import Component, option
from gentrain.noise import Noise
from gentrain.paths.space import Free, Space


def expand(t: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] so that it broadcasts against `like`."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def require_few(steps: int) -> None:
    """Raises ValueError for more steps than can be meant: networks tell about 1,000 times apart."""
    if steps > 100_000:
        raise ValueError(f"{steps} steps are more than any network tells apart, about 1000; take at most 100000")


@dataclass(kw_only=True)
class Path(Component, kind="path"):
    """Time runs from data (t_min) to noise (t_max). Every function takes t of any shape and works in t's dtype and device.

    Attributes:
        unbounded: x_t grows without bound with t, so that every network must be given x_t / its standard deviation.
        pure_noise: alpha(t_max) = 0, so that the noise-to-signal ratio sigma / alpha has no upper end.
    """

    unbounded: ClassVar[bool] = False
    pure_noise: ClassVar[bool] = False

    sigma_data: PositiveFloat = option(0.5, "standard deviation of the data, for EDM preconditioning", source="arXiv:2206.00364, table 1")
    space: Space = option(Free, "where it runs: free (R^D), dual (the mirror image of a convex set), inside (the set itself)")

    @property
    def t_min(self) -> float:
        raise NotImplementedError

    @property
    def t_max(self) -> float:
        raise NotImplementedError

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def alpha_prime(self, t: Tensor) -> Tensor:
        """d alpha / dt."""
        raise NotImplementedError

    def sigma_prime(self, t: Tensor) -> Tensor:
        """d sigma / dt."""
        raise NotImplementedError

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Inverse of `log_snr`; beyond the path's ends, infinite values included, the nearer end."""
        raise NotImplementedError

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is given for t: on the order of diffusers' timesteps [0, 1000], for sinusoidal embeddings."""
        raise NotImplementedError

    def log_snr(self, t: Tensor) -> Tensor:
        """2 log(alpha / sigma), decreasing in t; infinite where sigma or alpha is 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def eps_scale(self, t: Tensor) -> Tensor:
        """What the output of a network that predicts eps is multiplied by: about the deviation of what can be known of eps."""
        return torch.ones_like(t)

    @property
    def start(self) -> float:
        """What a draw of the space's prior is multiplied by to be x at t_max."""
        return float(self.sigma(torch.tensor(self.t_max, dtype=torch.float64)))

    def draw_eps(self, noise: Noise, shape: tuple[int, ...]) -> Tensor:
        """eps [B, ...] for `perturb`."""
        return self.space.prior(noise, shape)

    def perturb(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t; x0 (in the space's coordinates) and eps [B, ...], t [B]."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """d x_t / dt at fixed x0 and eps."""
        return expand(self.alpha_prime(t), x0) * x0 + expand(self.sigma_prime(t), x0) * eps

    def sampling_times(self, steps: int) -> Tensor:
        """[steps] decreasing float64 times at which a sampler asks the network; after the last one it goes to clean data.

        Equally spaced from t_max, where clean data (t = 0) would be the next.
        """
        return self.uniform_times(steps)

    def jump_times(self, steps: int) -> Tensor:
        """As `sampling_times`, for networks that go to clean data from any of them: t_min, where such a call changes nothing, is none."""
        require_few(steps)
        times = self.sampling_times(steps)
        return times if float(times[-1]) > self.t_min * (1 + 1e-6) else self.sampling_times(steps + 1)[:-1]

    def uniform_times(self, steps: int) -> Tensor:
        """As `sampling_times` where a path has no rule of its own."""
        return self.t_max * (1 - torch.arange(steps, dtype=torch.float64) / steps)

    def log_snr_times(self, steps: int) -> Tensor:
        """As `sampling_times`, equally spaced in log(alpha / sigma) from t_max to t_min (arXiv:2206.00927, section 3.4).

        Raises:
            ValueError: sigma / alpha is infinite at t_max, or 0 at t_min.
        """
        first, last = self.log_snr(torch.tensor([self.t_max, self.t_min], dtype=torch.float64)).tolist()
        if not math.isfinite(first - last):
            raise ValueError(f"{self.registered_name} has an infinite log-SNR at an end: no equal steps of it; use spacing: path")
        return self.time_of_log_snr(torch.linspace(first, last, steps, dtype=torch.float64))

    def karras_times(self, steps: int) -> Tensor:
        """As `sampling_times`, equally spaced in (sigma / alpha)^(1/7) from t_max to t_min (arXiv:2206.00364, eq. 5).

        Raises:
            ValueError: sigma / alpha is infinite at t_max.
        """
        if self.pure_noise:
            raise ValueError(f"{self.registered_name} ends in pure noise, where Karras spacing does not exist; use spacing: path")
        low, high = (-self.log_snr(torch.tensor([self.t_min, self.t_max], dtype=torch.float64)) / 14).exp()
        position = torch.linspace(0, 1, steps, dtype=torch.float64)
        return self.time_of_log_snr(-14 * (high + position * (low - high)).log())


def convert_time(t: Tensor, source: Path, target: Path) -> Tensor:
    """The time of `target` at which its signal-to-noise ratio equals that of `source` at t (the nearer end where it has none)."""
    return target.time_of_log_snr(source.log_snr(t))


def same_law(a: Path, b: Path) -> bool:
    """Whether x_t is distributed alike on both paths at each time, to what networks can tell."""
    if type(a) is not type(b) or (a.t_min, a.t_max) != (b.t_min, b.t_max):
        return False
    t = torch.linspace(a.t_min, a.t_max, 65, dtype=torch.float64)
    return torch.allclose(a.alpha(t), b.alpha(t), rtol=1e-6, atol=1e-9) and torch.allclose(a.sigma(t), b.sigma(t), rtol=1e-6, atol=1e-9)


class TimeLaw(Component, kind="time law"):
    """How training draws t."""

    def sample(self, uniform: Tensor, path: Path) -> Tensor:
        """uniform [B] in [0, 1) -> t [B] in [path.t_min, path.t_max], by the inverse of the law's distribution function.

        The method draws `uniform` from the noise it is handed, so that a sample meets the same t on any number of ranks.
        """
        raise NotImplementedError
