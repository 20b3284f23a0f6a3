"""What the samplers that walk down a grid of times share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gentrain.config import option
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.paths.base import Path, require_few
from gentrain.samplers.base import Sampler
from gentrain.samplers.guidance import guided_x0


@dataclass(frozen=True)
class Grid:
    """The times of the network calls [n], and alpha and sigma there and at the end of the walk, clean data [n + 1]."""

    times: list[float]
    alpha: list[float]
    sigma: list[float]


@dataclass(kw_only=True)
class GridSampler(Sampler):
    spacing: Literal["path", "karras", "log_snr", "uniform"] = option(
        "path",
        "times of the steps: path = the path's own (equal steps of its time, moved by a flow's `shift`; variance_exploding: Karras); "
        "karras = equal steps of (sigma / alpha)^(1/7); log_snr = of log(alpha / sigma); uniform = of the path's time",
        source="arXiv:2206.00364, eq. 5; arXiv:2206.00927, section 3.4",
    )

    def grid(self, path: Path) -> Grid:
        require_few(self.steps)
        rules = {"path": path.sampling_times, "karras": path.karras_times, "log_snr": path.log_snr_times, "uniform": path.uniform_times}
        return grid_of(path, rules[self.spacing](self.steps))

    def check(self, path: Path) -> None:
        super().check(path)
        self.grid(path)  # raises where the path has no such times

    @property
    def stock_spacing(self) -> bool:
        """Whether a stock scheduler may have these times."""
        return self.spacing in ("path", "karras")


def grid_of(path: Path, times: Tensor) -> Grid:
    # float64 numbers on the host: no device synchronisation in the loop, and no rounding in the differences of close times
    return Grid(times.tolist(), [*path.alpha(times).tolist(), 1.0], [*path.sigma(times).tolist(), 0.0])


class ProbabilityFlow:
    """The probability flow ODE dy/du = slope(y), in the variables in which diffusers' schedulers step it.

    Where sigma / alpha is finite on the whole path: y = x / alpha and u = sigma / alpha, where the slope is eps (arXiv:2206.00364, which
    finds this to bend trajectories least). Else y = x and u = t, and the slope is the velocity.
    """

    def __init__(self, denoiser: Denoiser, grid: Grid, condition: Condition | None, guidance: float):
        self.denoiser, self.grid, self.condition, self.guidance = denoiser, grid, condition, guidance
        self.own_time = denoiser.path.pure_noise
        self.scale = [1.0] * len(grid.alpha) if self.own_time else grid.alpha
        self.u = [*grid.times, 0.0] if self.own_time else [sigma / alpha for alpha, sigma in zip(grid.alpha, grid.sigma, strict=True)]

    def slope(self, y: Tensor, step: int) -> Tensor:
        t, alpha, sigma = self.grid.times[step], self.grid.alpha[step], self.grid.sigma[step]
        x = y * self.scale[step]
        x0 = guided_x0(self.denoiser, x, t, self.condition, self.guidance)
        eps = (x - alpha * x0) / sigma
        return self.denoiser.path.velocity(x0, eps, x.new_full((len(x),), t)) if self.own_time else eps
