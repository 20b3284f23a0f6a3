"""Optimisers and learning-rate schedules.

ZeRO 1-3 shows an optimiser flat shards instead of the parameters. Each entry says what it needs of a parameter, and a pair that would
silently become another optimiser is refused when the configuration loads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import nn

from gentrain.config import Component, Fraction, option, register
from gentrain.methods.base import Clock

Partition = Literal["elementwise", "global_scalar", "per_tensor", "matrix"]


class Optimizer(Component, kind="optimizer"):
    """An optimiser as configured.

    Attributes:
        needs: what a step needs to see of the parameters: `elementwise` (any slice will do), `global_scalar` (one number over all of
            them), `per_tensor` or `matrix` (each whole).
    """

    needs: ClassVar[Partition]
    lr: float

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        raise NotImplementedError


def decay_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """The parameters, those apart whose attribute `decays` a network has set to False: no weight decay pulls them towards zero.

    Resolved before an engine flattens them: each group gets shards of its own.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for p in parameters:
        groups[getattr(p, "decays", True)].append(p)
    rules: dict[bool, dict[str, Any]] = {True: {}, False: {"weight_decay": 0.0}}
    return [{"params": found, **rules[decays]} for decays, found in groups.items() if found]


@register("adamw")
@dataclass
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), torch's fused kernel."""

    needs = "elementwise"
    lr: PositiveFloat = option(1e-3, "peak learning rate")
    beta1: Fraction = option(0.9, "decay of the gradient average", unit="per step")
    beta2: Fraction = option(0.999, "decay of the squared-gradient average", unit="per step")
    eps: PositiveFloat = option(1e-8, "added to the root of the squared-gradient average")
    weight_decay: NonNegativeFloat = option(0.0, "decoupled; multiplied by the learning rate")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            decay_groups(parameters), lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, weight_decay=self.weight_decay, fused=True
        )


@register("sgd")
@dataclass
class SGD(Optimizer):
    """Stochastic gradient descent with heavy-ball momentum."""

    needs = "elementwise"
    lr: PositiveFloat = option(1e-2, "peak learning rate")
    momentum: Fraction = option(0.9, "decay of the velocity", unit="per step")
    weight_decay: NonNegativeFloat = option(0.0, "added to the gradient")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(decay_groups(parameters), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=True)


class Schedule(Component, kind="schedule"):
    """The learning rate over a run, as a pure function of the clock: nothing to save, nothing to lose on resume."""

    warmup: int

    def factor(self, clock: Clock) -> float:
        """Multiplies the optimiser's peak learning rate; in [0, 1]."""
        after_batch = clock.samples + clock.batch_size
        ramp = min(1.0, after_batch / self.warmup) if self.warmup else 1.0
        return ramp * self.decay(max(0.0, (clock.samples - self.warmup) / max(1, clock.total - self.warmup)))

    def decay(self, progress: float) -> float:
        """The factor at a fraction of the run after the warm-up."""
        raise NotImplementedError


@register("constant")
@dataclass
class Constant(Schedule):
    """Linear warm-up, then constant."""

    warmup: NonNegativeInt = option(0, "linear warm-up", unit="samples")

    def decay(self, progress: float) -> float:
        return 1.0


@register("cosine")
@dataclass
class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to `final` at the end of the run."""

    warmup: NonNegativeInt = option(0, "linear warm-up", unit="samples")
    final: Fraction = option(0.0, "factor at the end of the run")

    def decay(self, progress: float) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
