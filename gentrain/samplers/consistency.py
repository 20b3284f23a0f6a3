"""Sampling from consistency models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import PositiveInt
from torch import Tensor

from gentrain.config import option, register
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path
from gentrain.samplers.chain import Chain, Jump
from gentrain.samplers.guidance import guided_x0


@register("consistency")
@dataclass
class Consistency(Chain):
    """To clean data in one network call; each further step noises them to the next time and goes again (arXiv:2303.01469, algorithm 1).

    In a space with walls, clean data that lie outside are moved to the nearest point inside. A student of a guided teacher needs no
    guidance here.
    """

    keeps_inside: ClassVar[bool] = True

    steps: PositiveInt = option(1, "network calls")

    def check(self, path: Path) -> None:
        super().check(path)
        path.jump_times(self.steps)  # raises where the path has no such times

    def solve(self, denoiser: Denoiser, x: Tensor, noise: Noise, condition: Condition | None = None) -> Tensor:
        path = denoiser.path
        times = path.jump_times(self.steps)
        for step, t in enumerate(times.tolist()):
            if step > 0:
                x = path.perturb(x, path.draw_eps(noise, tuple(x.shape)), x.new_full((len(x),), t))
            x = guided_x0(denoiser, x, t, condition, self.guidance)
            if path.space.bounds is not None:
                x = path.space.bounds.project(x)
        return x

    def jump(self, denoiser: Denoiser, x: Tensor, index: int, condition: Condition | None = None) -> Jump:
        times = denoiser.path.jump_times(self.steps)
        return renoised(denoiser.path, guided_x0(denoiser, x, float(times[index]), condition, self.guidance), times, index)


def renoised(path: Path, x0: Tensor, times: Tensor, index: int) -> Jump:
    """From times[index] to clean data x0 and, but for the last jump, back to the next time's noise: N(alpha x0, sigma^2)."""
    alpha, sigma = path.alpha(times).tolist(), path.sigma(times).tolist()
    if index + 1 == len(times):
        return Jump(x0, x0, 0.0, alpha[index], sigma[index])
    return Jump(x0, alpha[index + 1] * x0, sigma[index + 1], alpha[index], sigma[index])
