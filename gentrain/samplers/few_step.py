"""Sampling from students of a few calls: noise through the network, then to noise and back at fixed times."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from gentrain.config import option, register
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path, expand
from gentrain.samplers.base import Sampler
from gentrain.samplers.chain import Chain, Jump
from gentrain.samplers.consistency import renoised
from gentrain.samplers.one_step import SIGMA, refuse_guidance, time_at


def call_times(path: Path, sigma: float, steps: int) -> Tensor:
    """[steps] falling float64 times at which a student is called: from the one where sigma / alpha is `sigma`, equally spaced in the
    path's own time, where t_min would be the next (arXiv:2405.14867, section 4.4: 999, 749, 499, 249 of 1,000 timesteps).

    Raises ValueError where the path has no such time.
    """
    first = time_at(path, sigma)
    return first - (first - path.t_min) * torch.arange(steps, dtype=torch.float64) / steps


def require_apart(path: Path, sigma: float, steps: int) -> None:
    """Raises ValueError, naming how many would do, unless neighbouring calls are a timestep apart, of about 1,000 that networks tell."""

    def least_fall(count: int) -> float:
        return float(path.network_time(call_times(path, sigma, count)).diff().max())

    most = 1 + bisect_right(range(2, min(steps, 1000) + 1), -1.0, key=least_fall)
    if steps > most:
        raise ValueError(f"a network cannot tell the times of {steps} calls apart; take at most {most} (4 are usual)")


@register("few_step")
@dataclass
class FewStep(Chain):
    """As `one_step` at first; then the clean data are noised to the next time and go through the network again (DMD2, arXiv:2405.14867,
    section 4.4), as students of `steps` calls are trained (`distribution_matching`)."""

    steps: PositiveInt = option(4, "network calls")
    sigma: PositiveFloat = option(SIGMA, "sigma / alpha at which the network reads noise alone", source="arXiv:2404.04057, section 4")

    def __post_init__(self) -> None:
        refuse_guidance(self)

    def check(self, path: Path) -> None:
        super().check(path)
        require_apart(path, self.sigma, self.steps)

    def start(self, path: Path) -> float:
        return float(path.sigma(call_times(path, self.sigma, 1))[0])

    def solve(self, denoiser: Denoiser, x: Tensor, noise: Noise, condition: Condition | None = None) -> Tensor:
        for index in range(self.steps):
            jump = self.jump(denoiser, x, index, condition)
            x = jump.x0 if index + 1 == self.steps else jump.mean + jump.deviation * denoiser.path.draw_eps(noise, tuple(x.shape))
        return x

    def jump(self, denoiser: Denoiser, x: Tensor, index: int, condition: Condition | None = None) -> Jump:
        times = call_times(denoiser.path, self.sigma, self.steps)
        x0 = denoiser.x0(x, x.new_full((len(x),), float(times[index])), condition)
        return renoised(denoiser.path, x0, times, index)


def require_few_step(sampler: Sampler, sigma: float, steps: int) -> None:
    """Raises ValueError, naming the remedy, unless it draws as a student of `steps` calls from `sigma` on was trained to."""
    if sampler != FewStep(steps=steps, sigma=sigma):
        got = sampler.registered_name + (f" with {sampler.steps} steps at sigma {sampler.sigma:g}" if isinstance(sampler, FewStep) else "")
        raise ValueError(
            f"a student of {steps} steps at sigma {sigma:g} cannot be drawn from by {got}; leave the sampler out, or set it to "
            f"{{name: few_step, steps: {steps}, sigma: {sigma:g}}}"
        )


def simulate(
    student: Denoiser, sampler: FewStep, z: Tensor, stage: Tensor, noise: Noise, condition: Condition | None
) -> tuple[Tensor, Tensor]:
    """(x_t [B, ...], t [B]): what each row's call number `stage` reads when the student draws: backward simulation (arXiv:2405.14867,
    section 4.5). Without gradient.

    Every call but the last is made for all rows, so that ranks make as many.

    Args:
        z: pure noise of unit deviation [B, ...].
        stage: [B] int64 in [0, steps).
    """
    path = student.path
    with torch.no_grad():
        x = sampler.start(path) * z
        for index in range(sampler.steps - 1):
            jump = sampler.jump(student, x, index, condition)
            then = jump.mean + jump.deviation * path.draw_eps(noise, tuple(x.shape))
            x = torch.where(expand(stage > index, x), then, x)
    return x, call_times(path, sampler.sigma, sampler.steps).to(x)[stage]
