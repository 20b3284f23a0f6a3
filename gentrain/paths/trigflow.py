"""The trigonometric path of continuous-time consistency models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gentrain.config import register
from gentrain.paths.base import Path


@register("trigflow")
@dataclass
class TrigFlow(Path):
    """x_t = cos(t) x_0 + sigma_data sin(t) eps, t in [0, pi/2] (sCM, arXiv:2410.11081, section 3.1); x_t has deviation sigma_data."""

    pure_noise: ClassVar[bool] = True

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return math.pi / 2

    def alpha(self, t: Tensor) -> Tensor:
        # pi/2 rounded to float32 lies above pi/2, where the cosine is negative
        return t.cos().clamp(min=0)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * t.sin()

    def alpha_prime(self, t: Tensor) -> Tensor:
        return -t.sin()

    def sigma_prime(self, t: Tensor) -> Tensor:
        return self.sigma_data * self.alpha(t)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return ((-log_snr / 2).exp() / self.sigma_data).atan()

    def network_time(self, t: Tensor) -> Tensor:
        """[0, 1000] over the whole path."""
        return t * (2000 / math.pi)
