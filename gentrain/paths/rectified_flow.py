"""The straight path of rectified flow and flow matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveFloat
from torch import Tensor

from gentrain.config import option, register
from gentrain.paths.base import Path


@register("rectified_flow")
@dataclass
class RectifiedFlow(Path):
    """x_t = (1 - t) x_0 + t eps, t in [0, 1] (arXiv:2209.03003, arXiv:2210.02747; time as in Stable Diffusion 3)."""

    pure_noise: ClassVar[bool] = True

    shift: PositiveFloat = option(
        1.0, "s: samplers' equal steps move towards noise, t -> s t / (1 + (s - 1) t)", source="arXiv:2403.03206, eq. 23"
    )

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_prime(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_prime(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2).sigmoid()

    def sampling_times(self, steps: int) -> Tensor:
        """As every path's, moved towards noise by `shift`, as diffusers' FlowMatchEulerDiscreteScheduler does."""
        times = super().sampling_times(steps)
        return self.shift * times / (1 + (self.shift - 1) * times)

    def network_time(self, t: Tensor) -> Tensor:
        """diffusers' timestep of flow matching."""
        return 1000 * t
