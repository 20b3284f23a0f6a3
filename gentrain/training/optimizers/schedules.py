"""Learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from gentrain.config import Component, Fraction, option, register
from gentrain.methods.base import Clock


class Schedule(Component, kind="schedule"):
    """The learning rate over a run, as a pure function of the clock: nothing to save, nothing to lose on resume."""

    warmup: int

    def factor(self, clock: Clock) -> float:
        """Multiplies the optimiser's peak learning rate; in [0, 1]."""
        after_batch = clock.samples + clock.batch_size
        ramp = min(1.0, after_batch / self.warmup) if self.warmup else 1.0
        return ramp * self.decay(max(0, clock.samples - self.warmup), max(1, clock.total - self.warmup))

    def decay(self, samples: int, total: int) -> float:
        """The factor when `samples` of the `total` after the warm-up have been seen; more than all, in a run that was made shorter."""
        raise NotImplementedError


@register("constant")
@dataclass
class Constant(Schedule):
    """Linear warm-up, then constant."""

    warmup: NonNegativeInt = option(0, "linear warm-up", unit="samples")

    def decay(self, samples: int, total: int) -> float:
        return 1.0


def half_cosine(progress: float, final: float) -> float:
    """From 1 at progress 0 down to `final` at 1 and beyond."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@register("cosine")
@dataclass
class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to `final` at the end of the run."""

    warmup: NonNegativeInt = option(0, "linear warm-up", unit="samples")
    final: Fraction = option(0.0, "factor at the end of the run")

    def decay(self, samples: int, total: int) -> float:
        return half_cosine(samples / total, self.final)


@register("warm_restarts")
@dataclass
class WarmRestarts(Schedule):
    """Half a cosine down to `final` and back to the peak at once, again and again (SGDR, arXiv:1608.03983, eq. 5)."""

    period: PositiveInt = option(help="length of the first cycle", unit="samples")
    growth: Annotated[float, Field(ge=1)] = option(2.0, "each cycle is so many times as long as the one before", source="section 4.1")
    warmup: NonNegativeInt = option(0, "linear warm-up before the first cycle", unit="samples")
    final: Fraction = option(0.0, "factor at the end of each cycle")

    def decay(self, samples: int, total: int) -> float:
        past, length = float(samples), float(self.period)
        while past >= length:
            past -= length
            length *= self.growth
        return half_cosine(past / length, self.final)


@register("inverse_square_root")
@dataclass
class InverseSquareRoot(Schedule):
    """Constant up to `reference` samples of the run, then falling with their root (arXiv:2312.02696, eq. 67). Knows no end of the run."""

    reference: PositiveInt = option(help="where it starts to fall: at four times as many it is one half", unit="samples")
    warmup: NonNegativeInt = option(0, "linear warm-up", unit="samples")

    def decay(self, samples: int, total: int) -> float:
        return max(1.0, (samples + self.warmup) / self.reference) ** -0.5


@register("warmup_stable_decay")
@dataclass
class WarmupStableDecay(Schedule):
    """Linear warm-up, constant, down in the last part of the run: one constant part serves several lengths of run (arXiv:2404.06395)."""

    warmup: NonNegativeInt = option(0, "linear warm-up", unit="samples")
    share: Fraction = option(0.2, "part of the run after the warm-up in which it falls", source="arXiv:2405.18392, section 4")
    final: Fraction = option(0.0, "factor at the end of the run")

    def decay(self, samples: int, total: int) -> float:
        left = max(0.0, 1 - samples / total)
        if left >= self.share:
            return 1.0
        return self.final + (1 - self.final) * (1 - (1 - left / self.share) ** 0.5)  # 1 - sqrt: arXiv:2405.18392, eq. 1


@dataclass
class Group:
    """Parameters with a learning rate of their own."""

    parameters: str = option(help="regular expression: those in whose names this is found, and in no group's before it")
    lr: PositiveFloat = option(1.0, "times the optimiser's")
    schedule: Schedule | None = option(None, "of their learning rate; left out: the role's")
