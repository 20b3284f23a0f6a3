"""Optimisers that find their own learning rate from a few numbers over all parameters, summed over the ranks where these hold shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from gentrain.config import option, register
from gentrain.training.optimizers.base import Decay, Optimizer, decay_groups

Held = list[tuple[Tensor, Tensor, dict[str, Any], dict[str, Any]]]  # parameter, gradient, state, group


class GlobalScalars(torch.optim.Optimizer):
    """An update rule with numbers over all parameters.

    Attributes:
        sharded: set by an engine whose ranks hold different shards: the sums then run over the ranks.
    """

    sharded = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        held = [(p, p.grad, self.state[p], group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if held:
            self.update(held)

    def update(self, held: Held) -> None:
        raise NotImplementedError

    def total(self, *parts: list[Tensor]) -> list[float]:
        """The sum of each list of numbers, over the parameters and over the ranks that hold shards of them."""
        sums = torch.stack([torch.stack(numbers).sum() for numbers in parts])
        if self.sharded and dist.is_initialized():
            dist.all_reduce(sums)
        return sums.tolist()


class _DoGRule(GlobalScalars):
    def update(self, held: Held) -> None:
        _, _, shared, group = held[0]
        if not shared:
            for p, _, state, _ in held:
                state["start"] = p.clone()
        squares = [[x.square().sum() for x in xs] for xs in zip(*((p - s["start"], g, s["start"]) for p, g, s, _ in held), strict=True)]
        moved, gradient, start = self.total(*squares)
        radius = max(float(shared.get("radius", group["initial"] * (1 + start**0.5))), moved**0.5)
        total = float(shared.get("squares", 0.0)) + gradient
        eta = group["lr"] * radius / (total + group["eps"]) ** 0.5
        for p, g, state, group in held:
            state.update(radius=torch.tensor(radius), squares=torch.tensor(total))
            p.sub_(g.add(p, alpha=group["weight_decay"]), alpha=eta)


@register("dog")
@dataclass
class DoG(Optimizer):
    """SGD with the step size distance over gradients (arXiv:2302.12022): the largest distance from the start so far / sqrt(sum |g|^2).

    Its last weights are noisy; take their average (a role with `ema`).
    """

    needs = "global_scalar"
    one_lr = True
    lr: PositiveFloat = option(1.0, "multiplies the step size that it finds; leave it, and the schedule constant")
    initial: PositiveFloat = option(1e-6, "length of the first step / (1 + norm of the weights)", source="arXiv:2302.12022, section 4.1")
    eps: PositiveFloat = option(1e-8, "added to the sum of squared gradients")
    weight_decay: NonNegativeFloat = option(0.0, "added to the gradient, outside of the sum")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        rule = {"lr": self.lr, "initial": self.initial, "eps": self.eps, "weight_decay": self.weight_decay}
        return _DoGRule(decay_groups(parameters), rule)


class _ProdigyRule(GlobalScalars):
    def update(self, held: Held) -> None:
        _, _, shared, group = held[0]
        if not shared:
            for p, _, state, _ in held:
                zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq", "s")}
                state.update(zeros, start=p.clone(), d=torch.tensor(group["d0"]), r=torch.tensor(0.0))
        (beta1, beta2), lr, d = group["betas"], group["lr"], float(shared["d"])
        root = beta2**0.5
        for _, g, state, _ in held:
            state["s"].mul_(root).add_(g, alpha=(1 - root) * lr * d**2)
        towards, size = self.total([(g * (s["start"] - p)).sum() for p, g, s, _ in held], [s["s"].abs().sum() for _, _, s, _ in held])
        r = root * float(shared["r"]) + (1 - root) * lr * d**2 * towards
        following = max(d, r / size) if size > 0 else d
        for p, g, state, group in held:
            m, v = state["exp_avg"], state["exp_avg_sq"]
            m.mul_(beta1).add_(g, alpha=(1 - beta1) * d)
            v.mul_(beta2).addcmul_(g, g, value=(1 - beta2) * d**2)
            p.mul_(1 - lr * d * group["weight_decay"])
            p.addcdiv_(m, v.sqrt().add_(d * group["eps"]), value=-lr * d)
            state.update(d=torch.tensor(following), r=torch.tensor(r))


@register("prodigy")
@dataclass
class Prodigy(Optimizer):
    """Adam that estimates how far the solution is, and steps accordingly (arXiv:2306.06101, algorithm 4).

    Written here: the libraries' sums see the parameters of one rank.
    """

    needs = "global_scalar"
    one_lr = True
    lr: PositiveFloat = option(1.0, "multiplies the step size that it finds")
    beta1: Decay = option(0.9, "decay of the gradient average", unit="per step")
    beta2: Decay = option(0.999, "decay of the squared-gradient average; its root is that of the estimate", unit="per step")
    eps: PositiveFloat = option(1e-8, "times the estimate, added to the root of the squared-gradient average")
    d0: PositiveFloat = option(1e-6, "first estimate of the distance", source="arXiv:2306.06101, section 6")
    weight_decay: NonNegativeFloat = option(0.0, "decoupled; multiplied by the estimate and the learning rate")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        rule = {"lr": self.lr, "betas": (self.beta1, self.beta2), "eps": self.eps, "d0": self.d0, "weight_decay": self.weight_decay}
        return _ProdigyRule(decay_groups(parameters), rule)
