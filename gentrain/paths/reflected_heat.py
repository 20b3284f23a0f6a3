"""The path of reflected diffusion: Brownian motion between the walls of a box."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from gentrain.config import option, register
from gentrain.domains.box import Box
from gentrain.noise import Noise
from gentrain.paths.base import Path, expand
from gentrain.paths.inside import Inside
from gentrain.paths.space import Space

_LEAST_SCALE = 1e-3  # of eps


@register("reflected_heat")
@dataclass
class ReflectedHeat(Path):
    """x_t = fold(x_0 + sigma(t) eps), t in [0, 1]: Brownian motion that walls reflect, of variance sigma^2 (arXiv:2304.04740, section 3).

    sigma(t) = sigma_min (sigma_max / sigma_min)^t, so that t is linear in log sigma. At t = 1 the law is uniform but for
    exp(-(pi sigma_max / width)^2 / 2). A network that predicts "eps" predicts -sigma times the score, divided by `eps_scale`; the
    probability flow's velocity is sigma'(t) times -sigma times the score.
    """

    sigma_min: PositiveFloat = option(
        0.01, "lowest noise level; 1e-4 where likelihoods matter", unit="of the data", source="arXiv:2304.04740"
    )
    sigma_max: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = option(
        10.0, "highest noise level; 5 times the width of the box", unit="of the data", source="arXiv:2304.04740"
    )
    space: Space = option(lambda: Inside(domain=Box(low=-1.0, high=1.0)), "a box (`inside`), or the simplex by `stick_breaking`")

    def __post_init__(self) -> None:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")

    @property
    def box(self) -> Box:
        """Raises ValueError when the space is not bounded by a box."""
        if not isinstance(self.space.bounds, Box):
            raise ValueError("reflected_heat has a kernel on boxes only; set path.space to inside with a box, or to stick_breaking")
        return self.space.bounds

    def require_fit(self) -> None:
        """Raises ValueError when the space is not bounded by a box, or sigma_max is too small for that box."""
        width = float((torch.as_tensor(self.box.high) - torch.as_tensor(self.box.low)).max())
        if self.sigma_max < 1.5 * width:
            raise ValueError(f"sigma_max {self.sigma_max} leaves data of a box of width {width} visible; set it to 5 widths, {5 * width}")

    @property
    def start(self) -> float:
        return 1.0

    def draw_eps(self, noise: Noise, shape: tuple[int, ...]) -> Tensor:
        return noise.normal(shape)

    def eps_scale(self, t: Tensor) -> Tensor:
        """u / sqrt(exp(u^2) - 1), u = pi sigma / width: sigma times the root of the kernel's Fisher information, but for some 10 %.

        1 where the walls are far, pi u exp(-u^2 / 2) where they have mixed nearly all: what is then left of the data would be lost in the
        errors of an output of order 1. At least 1e-3; what a score below that does is not seen.
        """
        low, high = self.box.bounds(t)
        u = math.pi * self.sigma(t) / float((high - low).max())
        return (u / u.square().expm1().sqrt()).clamp(min=_LEAST_SCALE)

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return 1.0

    @property
    def log_range(self) -> float:
        """log(sigma_max / sigma_min) = d log sigma / dt."""
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self.log_range * t).exp()

    def alpha_prime(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma_prime(self, t: Tensor) -> Tensor:
        return self.log_range * self.sigma(t)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return ((-log_snr / 2 - math.log(self.sigma_min)) / self.log_range).clamp(0, 1)

    def network_time(self, t: Tensor) -> Tensor:
        return 1000 * t

    def perturb(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t, folded in float32 at least: half precision would put it on the walls."""
        work = torch.promote_types(x0.dtype, torch.float32)
        return self.box.reflect(x0.to(work) + expand(self.sigma(t), x0) * eps)
