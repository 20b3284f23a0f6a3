"""What else may be done to the x0 prediction at each step of a sampler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from gentrain.config import ConfigError, Fraction, option, register
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path, expand
from gentrain.samplers.adaptive_ode import AdaptiveODE
from gentrain.samplers.base import Sampler
from gentrain.samplers.guidance import guided_x0
from gentrain.samplers.heun import Heun
from gentrain.samplers.ode import GridSampler


def dynamic_threshold(x0: Tensor, quantile: float) -> Tensor:
    """x0 [B, ...] clipped to [-s, s] and divided by s, the quantile of |x0| of each row, at least 1 (arXiv:2205.11487, section 2.3)."""
    s = expand(x0.abs().flatten(1).quantile(quantile, dim=1).clamp(min=1), x0)
    return x0.clamp(-s, s) / s


class AutoGuided(Denoiser):
    """Its x0 prediction is weak + weight (strong - weak), of a model and a worse one of its kind (arXiv:2406.02507, eq. 3).

    The weaker one is smaller or less trained, on the same path and conditions. Any sampler may be given it, with or without guidance.
    """

    def __init__(self, denoiser: Denoiser, weak: Denoiser, weight: float):
        super().__init__(denoiser.network, denoiser.path, denoiser.prediction)
        self.strong, self.weak, self.weight = denoiser, weak, weight

    def x0(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        weak = self.weak.x0(x_t, t, condition)
        return weak + self.weight * (self.strong.x0(x_t, t, condition) - weak)


class _Steered(Denoiser):
    def __init__(self, denoiser: Denoiser, sampler: Guided):
        super().__init__(denoiser.network, denoiser.path, denoiser.prediction)
        self.plain, self.sampler = denoiser, sampler

    def x0(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        sampler, level = self.sampler, (-self.path.log_snr(t) / 2).exp()  # sigma / alpha
        inside = (sampler.low <= level) & (level <= (torch.inf if sampler.high is None else sampler.high))
        if bool(inside.any()):
            x0 = guided_x0(self.plain, x_t, t, condition, sampler.guidance)
            if not bool(inside.all()):
                x0 = torch.where(expand(inside, x0), x0, self.plain.x0(x_t, t, condition))
        else:
            x0 = self.plain.x0(x_t, t, condition)
        return x0 if sampler.threshold is None else dynamic_threshold(x0, sampler.threshold)


@register("guided")
@dataclass
class Guided(Sampler):
    """Another sampler with guidance at some noise levels only (arXiv:2404.07724), by a weaker model, and with dynamic thresholding.

    Guidance harms variety at high noise and does nothing at low noise, where it costs a second row of each batch. Steps and guidance are
    given here, not in `sampler`.
    """

    sampler: Sampler = option(Heun, "the sampler that walks: one of a grid of times, or adaptive_ode")
    low: NonNegativeFloat = option(0.0, "lowest noise level sigma / alpha with guidance")
    high: NonNegativeFloat | None = option(None, "highest noise level with guidance; null = all above `low`")
    threshold: Fraction | None = option(
        None, "quantile of |x0| that is brought to 1 where it is larger, for data in [-1, 1]; null = none", source="arXiv:2205.11487: 0.995"
    )

    weak: str | None = option(
        None, "autoguidance: run of a smaller or less trained model of the same data, path and conditions", source="arXiv:2406.02507"
    )
    weak_weight: PositiveFloat = option(2.0, "w of weak + w (model - weak)", source="arXiv:2406.02507, eq. 3")

    weaker: ClassVar[Denoiser | None] = None  # the network of `weak`, which `training.weaker` loads

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, GridSampler | AdaptiveODE):
            raise ConfigError(
                f"{self.sampler.registered_name} is no sampler that steps by x0 predictions; take heun, dpm_solver or ddim", key="sampler"
            )
        if self.sampler.guidance != 1:
            raise ConfigError("set the guidance of `guided` itself, one level up", key="sampler.guidance")
        if self.high is not None and self.high < self.low:
            raise ConfigError(f"high {self.high} is below low {self.low}; swap them", key="high")

    @property
    def walker(self) -> Sampler:
        return replace(self.sampler, steps=self.steps)

    def check(self, path: Path) -> None:
        self.walker.check(path)

    def start(self, path: Path) -> float:
        return self.walker.start(path)

    def solve(self, denoiser: Denoiser, x: Tensor, noise: Noise, condition: Condition | None = None) -> Tensor:
        if self.weak is not None:
            if self.weaker is None:
                raise ValueError(f"the weaker model {self.weak} has not been loaded: draw with `gentrain sample` or a stage `generate`")
            denoiser = AutoGuided(denoiser, self.weaker, self.weak_weight)
        return self.walker.solve(_Steered(denoiser, self), x, noise, condition)
