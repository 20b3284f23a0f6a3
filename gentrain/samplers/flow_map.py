"""Sampling from flow maps, which go from any time to any earlier one in one call."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from gentrain.config import option, register
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path, expand
from gentrain.samplers.base import Sampler
from gentrain.samplers.guidance import guided_x0


def flow_step(path: Path, x: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """From x at time t [B] to time s < t along the probability flow, its x0 held fixed: DDIM's step, Euler's on a rectified flow.

    Where the path's space has walls the step is mirrored at them.
    """
    eps = (x - expand(path.alpha(t), x) * x0) / expand(path.sigma(t), x)
    there = expand(path.alpha(s), x) * x0 + expand(path.sigma(s), x) * eps
    return there if path.space.bounds is None else path.space.bounds.reflect(there, x)


def flow_map(denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None, guidance: float = 1.0) -> Tensor:
    """f(x_t, t -> s) [B, ...] of a network that takes the input "end" (see models.inputs), t > s [B].

    The step of `flow_step` with the network's mean prediction over [s, t]: x_t - (t - s) u on a rectified flow (arXiv:2505.13447, eq. 12).
    Where the network ignores `end`, as those of consistency models do, f(x_t, t -> 0) is their x0 prediction all the same.
    """
    path = denoiser.path
    condition = {**(condition or {}), "end": path.network_time(s)}
    return flow_step(path, x, guided_x0(denoiser, x, t, condition, guidance), t, s)


@register("flow_map")
@dataclass
class FlowMap(Sampler):
    """x -> f(x, t -> s) over the path's sampling times, deterministic: each step is as long as you like (arXiv:2505.13447, algorithm 2)."""

    keeps_inside: ClassVar[bool] = True

    steps: PositiveInt = option(1, "network calls")

    def check(self, path: Path) -> None:
        super().check(path)
        path.jump_times(self.steps)  # raises where the path has no such times

    def solve(self, denoiser: Denoiser, x: Tensor, noise: Noise, condition: Condition | None = None) -> Tensor:
        path = denoiser.path
        times = torch.cat([path.jump_times(self.steps), torch.tensor([path.t_min], dtype=torch.float64)]).tolist()
        for t, s in pairwise(times):
            x = flow_map(denoiser, x, x.new_full((len(x),), t), x.new_full((len(x),), s), condition, self.guidance)
        return x
