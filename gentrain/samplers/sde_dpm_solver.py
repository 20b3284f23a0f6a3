"""SDE-DPM-Solver++ (2M)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from gentrain.config import register
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser, Prediction
from gentrain.noise import Noise
from gentrain.paths.base import Path
from gentrain.samplers.dpm_solver import DPMSolver
from gentrain.samplers.guidance import guided_x0


@register("sde_dpm_solver")
@dataclass
class SDEDPMSolver(DPMSolver):
    """SDE-DPM-Solver++ (2M): DPM-Solver++ (2M) for the reverse diffusion, with fresh noise at every step (arXiv:2211.01095, appendix D).

    x' = e^-h (sigma' / sigma) x + alpha' (1 - e^-2h) D + sigma' sqrt(1 - e^-2h) z, where h is the step in log(alpha / sigma), and D the x0
    prediction extrapolated to the middle of the step as in DPM-Solver++ (2M), with the same first and last steps. The same steps as
    diffusers' DPMSolverMultistepScheduler and EDMDPMSolverMultistepScheduler with algorithm_type="sde-dpmsolver++".
    """

    fresh_noise: ClassVar[bool] = True

    def solve(self, denoiser: Denoiser, x: Tensor, noise: Noise, condition: Condition | None = None) -> Tensor:
        grid = self.grid(denoiser.path)
        previous: Tensor | None = None
        h_previous = 0.0
        for step, t in enumerate(grid.times):
            x0 = guided_x0(denoiser, x, t, condition, self.guidance)
            data = x0
            sigma, alpha = grid.sigma[step + 1], grid.alpha[step + 1]
            shrink = (sigma / alpha) * (grid.alpha[step] / grid.sigma[step])  # exp(-h), see DPMSolver
            h = -math.log(shrink) if shrink > 0 else math.inf
            if previous is not None and step + 1 < self.steps:
                data = x0 + (x0 - previous) * (h / (2 * h_previous))
            x = (sigma / grid.sigma[step]) * shrink * x + alpha * (1 - shrink**2) * data
            if sigma > 0:
                x = x + sigma * (1 - shrink**2) ** 0.5 * noise.normal(tuple(x.shape), x.dtype)
            previous, h_previous = x0, h
        return x

    def diffusers_scheduler(self, path: Path, prediction: Prediction) -> Any | None:
        scheduler = super().diffusers_scheduler(path, prediction)
        return None if scheduler is None else type(scheduler).from_config(scheduler.config, algorithm_type="sde-dpmsolver++")
