"""The laws by which training draws times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from gentrain.config import option, register
from gentrain.paths.base import Path, TimeLaw


@register("uniform")
@dataclass
class Uniform(TimeLaw):
    """t uniform over [t_min, t_max]."""

    def sample(self, uniform: Tensor, path: Path) -> Tensor:
        return path.t_min + (path.t_max - path.t_min) * uniform


@register("log_normal")
@dataclass
class LogNormal(TimeLaw):
    """log(sigma / alpha) ~ N(mean, std^2) (EDM, arXiv:2206.00364, table 1): the same noise-to-signal ratios on every path.

    What falls beyond the path's ends is put at the end.
    """

    mean: float = option(-1.2, "mean of log(sigma / alpha)", source="arXiv:2206.00364, table 1")
    std: PositiveFloat = option(1.2, "standard deviation of log(sigma / alpha)", source="arXiv:2206.00364, table 1")

    def sample(self, uniform: Tensor, path: Path) -> Tensor:
        return path.time_of_log_snr(-2 * (self.mean + self.std * torch.special.ndtri(uniform)))


@register("logit_normal")
@dataclass
class LogitNormal(TimeLaw):
    """logit(u) ~ N(mean, std^2) for the position u = (t - t_min) / (t_max - t_min) in the path's time (SD3, arXiv:2403.03206, eq. 19).

    On the rectified flow u is t, and this is also log_normal with the same two numbers. On the other paths it is a law over their own
    time: timesteps around the middle one for variance_preserving; of little use for variance_exploding, whose time is sigma.
    """

    mean: float = option(0.0, "mean of the logit", source="arXiv:2403.03206, section 5.1")
    std: PositiveFloat = option(1.0, "standard deviation of the logit", source="arXiv:2403.03206, section 5.1")

    def sample(self, uniform: Tensor, path: Path) -> Tensor:
        return path.t_min + (path.t_max - path.t_min) * (self.mean + self.std * torch.special.ndtri(uniform)).sigmoid()


@register("discrete")
@dataclass
class Discrete(TimeLaw):
    """One of `count` equally spaced times, both ends included: with count = num_train_timesteps the integer timesteps of DDPM."""

    count: PositiveInt = option(1000, "number of times", source="arXiv:2006.11239")

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError("count must be at least 2: the grid holds both ends of the path")

    def sample(self, uniform: Tensor, path: Path) -> Tensor:
        return path.t_min + (uniform * self.count).floor() * ((path.t_max - path.t_min) / (self.count - 1))
