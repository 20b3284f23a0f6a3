"""What the samplers' tests share: a smooth toy network, a loop around diffusers' schedulers, and a Gaussian whose flow is known."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser, Prediction
from gentrain.noise import Noise
from gentrain.paths.base import Path, expand
from gentrain.samplers.base import Sampler

SHAPE = (6, 2, 3, 3)
CONDITION = {"label": torch.tensor([0, 1, 2, 0, 1, 2])}


def toy_network(x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
    """Nonlinear in x, and dependent on time and on the label (the null class too)."""
    label = torch.full((len(x),), -1) if condition is None else condition["label"]
    return 0.6 * torch.tanh(x + expand(0.3 * label, x)) + 0.2 * x.flip(-1) + 0.2 * expand(torch.sin(t / 200), x)


def noise_for(shape: tuple[int, ...] = SHAPE) -> Noise:
    return Noise(0, torch.arange(shape[0]))


def difference_from_diffusers(
    sampler: Sampler,
    path: Path,
    prediction: Prediction,
    scheduler: Any,
    time_scale: float = 1.0,
    start: float | None = None,
    set_timesteps: dict[str, Any] | None = None,
    step_arguments: Callable[[], dict[str, Any]] = dict,
) -> float:
    """Greatest difference of the samples from the same x at t_max, relative to the samples' own scale."""
    scheduler.set_timesteps(**(set_timesteps or {"num_inference_steps": sampler.steps}))
    x = (start or scheduler.init_noise_sigma) * noise_for().normal(SHAPE)
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        time = torch.full((len(x),), float(t) * time_scale)
        null, conditional = toy_network(x_in, time, None), toy_network(x_in, time, CONDITION)
        output = null + sampler.guidance * (conditional - null)
        x = scheduler.step(output, t, x, **step_arguments()).prev_sample
    ours = sampler.sample(Denoiser(toy_network, path, prediction), SHAPE, noise_for(), CONDITION)
    assert ours.shape == SHAPE and ours.isfinite().all()
    return float((ours - x).abs().max() / x.abs().max())


class GaussianNetwork:
    """The exact denoiser of data N(mean, deviation^2) in float64, as a network that predicts x0 on `path`, and the flow's end point."""

    mean, deviation = 0.3, 0.5

    def __init__(self, path: Path):
        self.path = path

    def denoiser(self) -> Denoiser:
        return Denoiser(self._x0, self.path, "x0")

    def _x0(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        t = self._time_of(t)
        x = x * expand(self._scale(t), x)
        alpha, sigma = expand(self.path.alpha(t), x), expand(self.path.sigma(t), x)
        return self.mean + alpha * self.deviation**2 / (alpha**2 * self.deviation**2 + sigma**2) * (x - alpha * self.mean)

    def _scale(self, t: Tensor) -> Tensor:
        """Undoes the Denoiser's scaling of the network's input."""
        return (t**2 + self.path.sigma_data**2).sqrt() if self.path.unbounded else torch.ones_like(t)

    def _time_of(self, network_time: Tensor) -> Tensor:
        if self.path.unbounded:
            return (network_time / 250).exp()
        return network_time / self.path.network_time(torch.ones_like(network_time))

    def end(self, x: Tensor) -> Tensor:
        """The probability flow maps quantiles to quantiles: x at t_max to data."""
        t = torch.tensor(self.path.t_max, dtype=x.dtype)
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        return self.mean + self.deviation * (x - alpha * self.mean) / (alpha**2 * self.deviation**2 + sigma**2).sqrt()


def convergence_orders(sampler: type[Sampler], path: Path, steps: list[int], **fields: Any) -> list[float]:
    """log2 of the error's fall at each doubling of the steps."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None] * float(path.sigma(torch.tensor(path.t_max)))
    gaussian = GaussianNetwork(path)
    noise = Noise(0, torch.arange(9))
    errors = [(sampler(steps=count, **fields).solve(gaussian.denoiser(), x, noise) - gaussian.end(x)).abs().max().item() for count in steps]
    return [float(torch.tensor(a / b).log2()) for a, b in pairwise(errors)]
