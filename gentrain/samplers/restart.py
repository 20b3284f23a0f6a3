"""Restart sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from gentrain.config import option, register
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path
from gentrain.samplers.heun import heun_step
from gentrain.samplers.ode import Grid, GridSampler, ProbabilityFlow, grid_of


@register("restart")
@dataclass
class Restart(GridSampler):
    """Heun's walk that is thrown back: once at noise level `low`, it is noised to `high` and walks down again, `times` times.

    The fresh noise contracts the errors of the walk so far, which the deterministic flow carries on (arXiv:2306.14878, algorithm 1).
    2 steps - 1 network calls for the walk, 2 restart_steps for each restart.
    """

    fresh_noise: ClassVar[bool] = True

    low: PositiveFloat = option(0.05, "noise level sigma / alpha at which it restarts, at the next step of the walk above it")
    high: PositiveFloat = option(0.3, "noise level to which it goes back", source="arXiv:2306.14878, table 3 (CIFAR-10)")
    times: PositiveInt = option(2, "restarts")
    restart_steps: PositiveInt = option(3, "steps of each walk from `high` down, equally spaced in (sigma / alpha)^(1/7)")

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")

    def solve(self, denoiser: Denoiser, x: Tensor, noise: Noise, condition: Condition | None = None) -> Tensor:
        """Raises ValueError where no step of the walk lies between the two noise levels."""
        grid = self.grid(denoiser.path)
        flow, last = ProbabilityFlow(denoiser, grid, condition, self.guidance), self._last(grid)
        again = self._again(denoiser, grid, last)
        y = x / flow.scale[0]
        for step in range(self.steps):
            if step == last:
                y = y * flow.scale[step]
                for _ in range(self.times):
                    y = self._walk_again(ProbabilityFlow(denoiser, again, condition, self.guidance), y, noise)
                y = y / flow.scale[step]
            y = heun_step(flow, y, step, correct=step + 1 < self.steps)
        return y

    def check(self, path: Path) -> None:
        super().check(path)
        self._last(self.grid(path))

    def _last(self, grid: Grid) -> int:
        """The last step of the walk at or above `low`. Raises ValueError where that is none, or above `high`."""
        levels = [sigma / alpha if alpha else math.inf for alpha, sigma in zip(grid.alpha, grid.sigma, strict=True)]
        last = max((step for step in range(self.steps) if levels[step] >= self.low), default=-1)
        if last < 1 or levels[last] >= self.high:
            raise ValueError(f"no step of the walk lies between noise levels {self.low} and {self.high}; take more steps, or raise high")
        return last

    def _again(self, denoiser: Denoiser, grid: Grid, last: int) -> Grid:
        """From `high` down to the step `last` of the walk, that one included."""
        low, path = grid.sigma[last] / grid.alpha[last], denoiser.path
        position = torch.linspace(0, 1, self.restart_steps + 1, dtype=torch.float64)[:-1]
        levels = (self.high ** (1 / 7) + position * (low ** (1 / 7) - self.high ** (1 / 7))) ** 7
        times = path.time_of_log_snr(-2 * levels.log())
        return grid_of(path, torch.cat([times, torch.tensor(grid.times[last : last + 1], dtype=torch.float64)]))

    def _walk_again(self, flow: ProbabilityFlow, x: Tensor, noise: Noise) -> Tensor:
        """x at the end of the flow's grid, noised to its begin and brought back."""
        alpha, sigma = flow.grid.alpha, flow.grid.sigma
        keep = alpha[0] / alpha[-2]
        x = keep * x + (sigma[0] ** 2 - (keep * sigma[-2]) ** 2) ** 0.5 * noise.normal(tuple(x.shape), x.dtype)
        y = x / flow.scale[0]
        for step in range(self.restart_steps):
            y = heun_step(flow, y, step)
        return y * flow.scale[self.restart_steps]
