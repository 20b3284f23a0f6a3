"""DDIM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from gentrain.config import Fraction, option, register
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser, Prediction
from gentrain.noise import Noise
from gentrain.paths.base import Path
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.chain import Chain, Jump
from gentrain.samplers.guidance import guided_x0
from gentrain.samplers.ode import GridSampler
from gentrain.samplers.stock import variance_preserving_arguments


@register("ddim")
@dataclass
class DDIM(GridSampler, Chain):
    """DDIM (arXiv:2010.02502, eq. 12): to the next time with the predicted x0 and eps, part of eps being drawn anew.

    eq. 16, written with alpha and sigma, is the deviation of the reverse process on any path: with eta = 1 this is DDPM's
    ancestral sampling. The same steps as diffusers' DDIMScheduler (variance preserving; timestep_spacing="trailing",
    clip_sample=False, and its `step` given eta) where the number of steps divides that of the timesteps.
    """

    fresh_noise: ClassVar[bool] = True

    eta: Fraction = option(0.0, "share of fresh noise: 0 = deterministic, 1 = DDPM", source="arXiv:2010.02502, eq. 16")

    def check(self, path: Path) -> None:
        if self.eta > 0:
            super().check(path)
        self.grid(path)

    def solve(self, denoiser: Denoiser, x: Tensor, noise: Noise, condition: Condition | None = None) -> Tensor:
        for index in range(self.steps):
            jump = self.jump(denoiser, x, index, condition)
            x = jump.mean
            if jump.deviation > 0:
                x = x + jump.deviation * noise.normal(tuple(x.shape), x.dtype)
        return x

    def jump(self, denoiser: Denoiser, x: Tensor, index: int, condition: Condition | None = None) -> Jump:
        grid = self.grid(denoiser.path)
        x0 = guided_x0(denoiser, x, grid.times[index], condition, self.guidance)
        eps = (x - grid.alpha[index] * x0) / grid.sigma[index]
        alpha, sigma = grid.alpha[index + 1], grid.sigma[index + 1]
        shrink = (sigma / alpha) * (grid.alpha[index] / grid.sigma[index])
        fresh = self.eta * sigma * (1 - shrink**2) ** 0.5
        mean = alpha * x0 + (sigma**2 - fresh**2) ** 0.5 * eps
        return Jump(x0, mean, fresh, grid.alpha[index], grid.sigma[index])

    def start(self, path: Path) -> float:
        return 1.0 if isinstance(path, VariancePreserving) else super().start(path)  # diffusers' convention

    def diffusers_scheduler(self, path: Path, prediction: Prediction) -> Any | None:
        from diffusers import DDIMScheduler

        arguments = variance_preserving_arguments(path, prediction)
        if arguments is None or self.spacing != "path" or arguments["num_train_timesteps"] % self.steps:
            return None
        return DDIMScheduler(**arguments, clip_sample=False)
