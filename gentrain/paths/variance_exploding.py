"""The variance-exploding path of EDM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveFloat
from torch import Tensor

from gentrain.config import option, register
from gentrain.paths.base import Path


@register("variance_exploding")
@dataclass
class VarianceExploding(Path):
    """x_t = x_0 + t eps: time is the noise level sigma (EDM, arXiv:2206.00364)."""

    unbounded: ClassVar[bool] = True

    sigma_min: PositiveFloat = option(0.002, "lowest noise level", source="arXiv:2206.00364, table 1")
    sigma_max: PositiveFloat = option(80.0, "highest noise level", source="arXiv:2206.00364, table 1")

    def __post_init__(self) -> None:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_prime(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma_prime(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2).exp().clamp(self.sigma_min, self.sigma_max)

    def network_time(self, t: Tensor) -> Tensor:
        """1000 times EDM's c_noise = log(sigma) / 4: [-1554, 1096] for the default range."""
        return 250 * t.log()

    def sampling_times(self, steps: int) -> Tensor:
        """Karras spacing: equal steps of sigma itself would all lie in the noise."""
        return self.karras_times(steps)
