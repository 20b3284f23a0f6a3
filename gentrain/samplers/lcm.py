"""The sampler of latent consistency models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import PositiveInt
from torch import Tensor

from gentrain.config import option, register
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.models.reading import length
from gentrain.noise import Noise
from gentrain.paths.base import Path, convert_time, expand
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.chain import Chain, Jump
from gentrain.samplers.consistency import renoised

MOST_DATA = 0.1  # alpha^2 of the timestep at which sampling begins; Stable Diffusion's schedule ends at .005


def boundary_scalings(t: Tensor, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of f = c_skip x_t + c_out x0 for timesteps t of any shape: (1, 0) at t = 0, next to (0, 1) above.

    c_skip = sigma_data^2 / ((s t)^2 + sigma_data^2), c_out = s t / sqrt((s t)^2 + sigma_data^2), s = timestep_scaling (arXiv:2310.04378,
    code release; diffusers' LCMScheduler). In t's dtype if that is floating, else float32.
    """
    scaled = timestep_scaling * (t if t.is_floating_point() else t.float())
    square = scaled**2 + sigma_data**2
    return sigma_data**2 / square, scaled / square.sqrt()


def lcm_timesteps(count: int, stride: int) -> Tensor:
    """The timesteps stride * i - 1, i = 1 .. count, between which the teacher steps: [count] int64, ascending (arXiv:2310.04378, 4.3)."""
    return torch.arange(1, count + 1) * stride - 1


def lcm_sampling_timesteps(steps: int, count: int, stride: int) -> Tensor:
    """Those of `lcm_timesteps` at which a sampler asks the student: [steps] int64, descending from the last; diffusers' choice.

    Raises ValueError: more steps than timesteps.
    """
    if steps > count:
        raise ValueError(f"{steps} steps of a student that was taught on {count} timesteps; take at most that many")
    positions = (torch.arange(steps, dtype=torch.float64) * count / steps).floor().long()
    return lcm_timesteps(count, stride).flip(0)[positions]


def check_timesteps(count: int, stride: int, grid: VariancePreserving) -> None:
    """Raises ValueError, naming the remedy, unless `lcm_timesteps` lie on the grid and noise alone can stand for x at the last."""
    whole, last = grid.num_train_timesteps, count * stride - 1
    if last > grid.t_max:
        raise ValueError(f"count {count} times stride {stride} goes beyond the {whole} timesteps; let their product be {whole} or less")
    share = float(grid.alpha(torch.tensor(last, dtype=torch.float64)) ** 2)
    if share > MOST_DATA:
        raise ValueError(
            f"the last of {count} timesteps {stride} apart is {last}, where {share:.0%} of x is data, and samples begin there as noise "
            f"alone; let count times stride be near {whole}"
        )


def stable_diffusion_grid() -> VariancePreserving:
    return VariancePreserving(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def grid_of(path: Path, fallback: VariancePreserving) -> VariancePreserving:
    """The path on whose timesteps the student is taught: its own where that is variance preserving."""
    return path if isinstance(path, VariancePreserving) else fallback


def consistent(path: Path, grid: VariancePreserving, x: Tensor, x0: Tensor, timesteps: Tensor) -> Tensor:
    """c_skip z + c_out x0 for x [B, ...] of `path` and its x0 prediction; z is x on the grid's path, timesteps [B] are the grid's."""
    skip, out = boundary_scalings(timesteps.to(x))
    z = x / expand(length(path, convert_time(timesteps.to(x), grid, path)), x)
    return expand(skip, x) * z + expand(out, x) * x0


@register("lcm")
@dataclass
class LCM(Chain):
    """Multistep latent consistency sampling (arXiv:2310.04378): to clean data in one call, noise them to the next timestep, go again.

    On a variance-preserving path the samples of diffusers' LCMScheduler. The denoiser of another path is asked at the times at which its
    signal-to-noise ratio is that of the grid's timesteps, as `latent_consistency` teaches it. `guidance` is the teacher's that a student
    with a guidance embedding imitates; other students have theirs built in and take no notice.
    """

    steps: PositiveInt = option(4, "network calls")
    count: PositiveInt = option(50, "timesteps between which the teacher stepped", source="arXiv:2310.04378, code release")
    stride: PositiveInt = option(20, "distance between them", unit="timesteps", source="arXiv:2310.04378, section 4.3")
    grid: VariancePreserving = option(stable_diffusion_grid, "the timesteps' path, where the student's own is not variance preserving")

    def __post_init__(self) -> None:
        lcm_sampling_timesteps(self.steps, self.count, self.stride)

    def check(self, path: Path) -> None:
        super().check(path)
        check_timesteps(self.count, self.stride, grid_of(path, self.grid))

    def start(self, path: Path) -> float:
        grid = grid_of(path, self.grid)
        last = lcm_sampling_timesteps(self.steps, self.count, self.stride)[:1].double()
        return float(length(path, convert_time(last, grid, path)))

    def solve(self, denoiser: Denoiser, x: Tensor, noise: Noise, condition: Condition | None = None) -> Tensor:
        path, grid = denoiser.path, grid_of(denoiser.path, self.grid)
        condition = {**(condition or {}), "guidance": x.new_full((len(x),), self.guidance - 1)}
        for step, timestep in enumerate(lcm_sampling_timesteps(self.steps, self.count, self.stride).tolist()):
            timesteps = x.new_full((len(x),), timestep)
            t = convert_time(timesteps, grid, path) if path is not grid else timesteps
            if step > 0:
                x = path.perturb(x, path.draw_eps(noise, tuple(x.shape)), t)
            x = consistent(path, grid, x, denoiser.x0(x, t, condition), timesteps)
        return x

    def jump(self, denoiser: Denoiser, x: Tensor, index: int, condition: Condition | None = None) -> Jump:
        path, grid = denoiser.path, grid_of(denoiser.path, self.grid)
        nodes = lcm_sampling_timesteps(self.steps, self.count, self.stride).double()
        times = convert_time(nodes, grid, path) if path is not grid else nodes
        condition = {**(condition or {}), "guidance": x.new_full((len(x),), self.guidance - 1)}
        found = denoiser.x0(x, x.new_full((len(x),), float(times[index])), condition)
        x0 = consistent(path, grid, x, found, x.new_full((len(x),), float(nodes[index])))
        return renoised(path, x0, times, index)
