"""Sampling from one-step students: pure noise through the network once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from gentrain.config import errors_about, option, register
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path
from gentrain.samplers.base import Sampler

SIGMA = 2.5  # SiD's sigma_init (arXiv:2404.04057, section 4)


def time_at(path: Path, sigma: float, key: str = "sigma") -> float:
    """The time at which sigma(t) / alpha(t) is `sigma`. Raises ValueError, naming the option `key`, where the path has none."""
    t = path.time_of_log_snr(torch.tensor(-2 * math.log(sigma), dtype=torch.float64))
    there = (-path.log_snr(t) / 2).exp()
    if not torch.isclose(there, there.new_tensor(sigma), rtol=1e-6):
        raise ValueError(
            f"{path.registered_name} never has sigma / alpha = {sigma:g}, the nearest is {there:.4g}; set {key} to that or inside"
        )
    return float(t)


def check_sigma(path: Path, sigma: float, key: str = "sigma") -> None:
    """Raises ConfigError about the option `key` where the path has no such time."""
    with errors_about(key):
        time_at(path, sigma, key)


def generate(denoiser: Denoiser, z: Tensor, sigma: float, condition: Condition | None) -> Tensor:
    """Clean data x0 [B, ...] from pure noise z [B, ...] of unit deviation, in the path's coordinates; one network call.

    x0(sigma(t) z, t, condition) at the time t at which sigma(t) / alpha(t) is `sigma`: the network reads noise alone as x_t, with no
    signal part whatever the path's alpha is there (arXiv:2404.04057, section 4: G(z) = f(sigma_init z, sigma_init)).
    """
    path = denoiser.path
    t = z.new_full((len(z),), time_at(path, sigma))
    return denoiser.x0(path.sigma(t)[0] * z, t, condition)


def as_affine(denoiser: Denoiser, time: float) -> dict[str, float]:
    """The x0 prediction of x at `time` without the denoiser: x_weight x + output_weight network(input_scale x, timestep).

    x0 is affine in the network's output, whatever the prediction and the path, so that these numbers, and the path's alpha and sigma at
    that time, are all that code elsewhere needs to draw.
    """
    t = torch.tensor([time], dtype=torch.float64)
    path = denoiser.path
    seen: dict[str, float] = {}

    def x0(output: float) -> float:
        def network(x: Tensor, timestep: Tensor, condition: Condition | None) -> Tensor:
            seen.update(input_scale=float(x), timestep=float(timestep))
            return torch.full_like(x, output)

        return float(Denoiser(network, path, denoiser.prediction).x0(torch.ones_like(t), t))

    x_weight = x0(0.0)
    output_weight = x0(1.0) - x_weight
    return {"alpha": float(path.alpha(t)), "sigma": float(path.sigma(t)), **seen, "x_weight": x_weight, "output_weight": output_weight}


def require_one_step(sampler: Sampler, sigma: float) -> None:
    """Raises ValueError, naming the remedy, unless it draws as a student of one step at `sigma` was trained to."""
    if not isinstance(sampler, OneStep) or sampler.sigma != sigma:
        got = sampler.registered_name + (f" with sigma {sampler.sigma:g}" if isinstance(sampler, OneStep) else "")
        raise ValueError(
            f"a student of one step at sigma {sigma:g} cannot be drawn from by {got}; leave the sampler out, or set it to "
            f"{{name: one_step, sigma: {sigma:g}}}"
        )


def refuse_guidance(sampler: Sampler) -> None:
    """Raises ValueError where a sampler of students is guided."""
    if sampler.guidance != 1:
        calls = "one-step" if sampler.steps == 1 else "few-step"
        raise ValueError(f"a {calls} student is not guided: it has learnt its teacher's guidance; leave guidance out")


@register("one_step")
@dataclass
class OneStep(Sampler):
    """Noise through the network once, as one-step students (`distribution_matching`, `sfd`) are trained."""

    steps: PositiveInt = option(1, "network calls: one")
    sigma: PositiveFloat = option(SIGMA, "sigma / alpha at which the network reads the noise", source="arXiv:2404.04057, section 4")

    def __post_init__(self) -> None:
        if self.steps != 1:
            raise ValueError(f"one_step takes 1 step, not {self.steps}; leave steps out")
        refuse_guidance(self)

    def start(self, path: Path) -> float:
        return float(path.sigma(torch.tensor(time_at(path, self.sigma), dtype=torch.float64)))

    def solve(self, denoiser: Denoiser, x: Tensor, noise: Noise, condition: Condition | None = None) -> Tensor:
        return generate(denoiser, x / self.start(denoiser.path), self.sigma, condition)
