"""Optimisers that step each element by itself, as torch and pytorch-optimizer have them: right on any shard."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from gentrain.config import option, register
from gentrain.training.optimizers.base import AdamLike, Averaging, Decay, Optimizer, counted, decay_groups


@register("adamw")
@dataclass
class AdamW(AdamLike):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), torch's fused kernel."""

    needs = "elementwise"

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(decay_groups(parameters), **self.rule(), fused=True)

    def scaled(self, times: float) -> AdamW:
        """The square-root rule, which leaves the way by samples as it is where the gradient is mostly noise (arXiv:2205.10287, def. 4.2).

        The paper has no weight decay; times the root as well, it pulls as much per sample.
        """
        betas = [1 - times * (1 - beta) for beta in (self.beta1, self.beta2)]
        if min(betas) < 0:
            most = 1 / (1 - min(self.beta1, self.beta2))
            raise ValueError(f"the rule reaches batches {most:.3g} times as large, this one is {times:.3g} times; leave it out")
        root = times**0.5
        return replace(self, lr=self.lr * root, beta1=betas[0], beta2=betas[1], eps=self.eps / root, weight_decay=self.weight_decay * root)


@register("radam")
@dataclass
class RAdam(AdamLike):
    """Adam whose first steps are shortened by the variance of their own scale (arXiv:1908.03265), torch's; weight decay is decoupled."""

    needs = "elementwise"

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.RAdam(decay_groups(parameters), **self.rule(), decoupled_weight_decay=True)


@register("sgd")
@dataclass
class SGD(Optimizer):
    """Stochastic gradient descent with heavy-ball momentum."""

    needs = "elementwise"
    lr: PositiveFloat = option(1e-2, "peak learning rate")
    momentum: Decay = option(0.9, "decay of the velocity", unit="per step")
    weight_decay: NonNegativeFloat = option(0.0, "added to the gradient")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(decay_groups(parameters), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=True)


@register("lion")
@dataclass
class Lion(Optimizer):
    """The sign of a gradient average (arXiv:2302.06675); one state instead of Adam's two, and a third to a tenth of its learning rate."""

    needs = "elementwise"
    lr: PositiveFloat = option(1e-4, "peak learning rate", source="arXiv:2302.06675, algorithm 2")
    beta1: Decay = option(0.9, "share of the average in the step's direction", source="arXiv:2302.06675, algorithm 2")
    beta2: Decay = option(0.99, "decay of the gradient average", unit="per step", source="arXiv:2302.06675, algorithm 2")
    weight_decay: NonNegativeFloat = option(0.0, "decoupled; multiplied by the learning rate")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        from pytorch_optimizer import Lion as Library

        return counted(Library)(
            decay_groups(parameters),
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            weight_decay=self.weight_decay,  # type: ignore[call-arg]
        )


@register("ademamix")
@dataclass
class AdEMAMix(Optimizer):
    """AdamW with a second, slow gradient average beside the quick one (arXiv:2409.03137)."""

    needs = "elementwise"
    lr: PositiveFloat = option(1e-3, "peak learning rate")
    beta1: Decay = option(0.9, "decay of the quick gradient average", unit="per step", source="arXiv:2409.03137, section 3")
    beta2: Decay = option(0.999, "decay of the squared-gradient average", unit="per step", source="arXiv:2409.03137, section 3")
    beta3: Decay = option(0.9999, "decay of the slow gradient average", unit="per step", source="arXiv:2409.03137, section 3")
    alpha: NonNegativeFloat = option(5.0, "weight of the slow average; the quick one's is 1", source="arXiv:2409.03137, section 3")
    warmup: PositiveInt | None = option(
        None, "steps over which alpha and beta3 reach their values; null = there from the start", unit="optimiser steps"
    )
    eps: PositiveFloat = option(1e-8, "added to the root of the squared-gradient average")
    weight_decay: NonNegativeFloat = option(0.0, "decoupled; multiplied by the learning rate")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        from pytorch_optimizer import AdEMAMix as Library

        return counted(Library)(
            decay_groups(parameters),
            lr=self.lr,
            betas=(self.beta1, self.beta2, self.beta3),  # type: ignore[call-arg]
            alpha=self.alpha,
            t_alpha_beta3=self.warmup,
            eps=self.eps,
            weight_decay=self.weight_decay,
            weight_decouple=True,
        )


@register("grams")
@dataclass
class Grams(AdamLike):
    """The magnitude of AdamW's step with the sign of the present gradient (arXiv:2412.17107)."""

    needs = "elementwise"
    eps: PositiveFloat = option(1e-6, "added to the root of the squared-gradient average", source="arXiv:2412.17107, code release")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        from pytorch_optimizer import Grams as Library

        return counted(Library)(decay_groups(parameters), **self.rule())


@register("schedule_free")
@dataclass
class ScheduleFree(AdamLike):
    """Schedule-free AdamW (arXiv:2405.15682, algorithm 1): an average takes the place of a falling learning rate and of knowing the end.

    Gradients are taken between z, which AdamW moves without momentum, and x, the mean of all z weighed by squared learning rates. x is
    the average of the role, which is sampled, evaluated and exported; `training.ema_half_life` has no say in it. Leave the schedule
    constant, with a warm-up.
    """

    needs = "elementwise"
    averages = True
    one_lr = True
    lr: PositiveFloat = option(2.5e-3, "learning rate: one to ten times AdamW's", source="arXiv:2405.15682, appendix C")
    beta1: Annotated[float, Field(gt=0, lt=1)] = option(0.9, "share of x where gradients are taken; the rest is z's")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        from pytorch_optimizer import ScheduleFreeAdamW as Library

        class Kept(counted(Library, "weight_sum", "lr_max"), Averaging):  # type: ignore[misc]
            def average(self, p: Tensor) -> Tensor:
                # y = b x + (1 - b) z, solved for x
                return p.detach().lerp(self.state[p]["z"], 1 - 1 / self.defaults["betas"][0])

        return Kept(decay_groups(parameters), **self.rule())
