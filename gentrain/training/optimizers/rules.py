"""Elementwise optimisers that no kept library has, written from their papers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from gentrain.config import option, register
from gentrain.training.optimizers.base import AdamLike, Decay, Optimizer, Rule, decay_groups


class _AdaMomentumRule(Rule):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        beta1, beta2 = group["betas"]
        state["step"] += 1
        step, m, v = state["step"].item(), state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(m, m, value=1 - beta2).add_(group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.addcdiv_(m, v.sqrt(), value=-group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step))


@register("adamomentum")
@dataclass
class AdaMomentum(AdamLike):
    """Adam whose second moment is that of the averaged gradient, not of the gradient (arXiv:2106.11514, algorithm 1).

    m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) m^2 + eps; the step is m / sqrt(v), both without their bias.
    """

    needs = "elementwise"
    beta2: Decay = option(0.999, "decay of the average of its square", unit="per step")
    eps: PositiveFloat = option(1e-16, "added to the average of squares at every step: it may be about the square of Adam's")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return _AdaMomentumRule(decay_groups(parameters), self.rule())


class _NAGGSRule(Rule):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(gamma=torch.tensor(group["gamma"]), v=p.clone())
        alpha, mu = group["lr"], group["mu"]
        state["gamma"] = (state["gamma"] + alpha * mu) / (1 + alpha)
        b = alpha * mu / (alpha * mu + state["gamma"].item())
        state["v"].lerp_(p, b).sub_(g, alpha=b / mu)
        p.lerp_(state["v"], alpha / (1 + alpha))


@register("nag_gs")
@dataclass
class NAGGS(Optimizer):
    """Nesterov's flow, discretised semi-implicitly (arXiv:2209.14937, algorithm 1). One state.

    x = (x + a v) / (1 + a) and then, with the gradient there, v = (1 - b) v + b x - (b / mu) g, where b = a mu / (a mu + gamma), a is
    the learning rate and gamma = (gamma + a mu) / (1 + a). It starts at x with v = x.
    """

    needs = "elementwise"
    one_lr = True
    lr: PositiveFloat = option(1e-2, "peak of a, the time that a step takes")
    mu: PositiveFloat = option(1.0, "assumed strong convexity: a smaller one takes longer steps")
    gamma: PositiveFloat = option(1.0, "damping at the start; it tends to mu")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return _NAGGSRule(decay_groups(parameters), {"lr": self.lr, "mu": self.mu, "gamma": self.gamma})


class _OptimisticAMSGradRule(Rule):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "guess")}
            v = torch.full_like(p, group["eps"])
            state.update(zeros, exp_avg_sq=v, max_exp_avg_sq=v.clone(), behind=p.clone())
        beta1, beta2 = group["betas"]
        largest = state["max_exp_avg_sq"]
        state["exp_avg"].lerp_(g, 1 - beta1)
        surprise = g - state["guess"]
        state["exp_avg_sq"].mul_(beta2).addcmul_(surprise, surprise, value=1 - beta2)
        torch.maximum(largest, state["exp_avg_sq"], out=largest)
        root = largest.sqrt()
        state["guess"].copy_(g)
        state["behind"].addcdiv_(state["exp_avg"], root, value=-group["lr"])
        # The guessed direction, beta1 theta_{t-1} + (1 - beta1) guess, is theta_t where the guess is the last gradient.
        p.copy_(state["behind"]).addcdiv_(state["exp_avg"], root, value=-group["lr"])


@register("optimistic_amsgrad")
@dataclass
class OptimisticAMSGrad(Optimizer):
    """AMSGrad that steps ahead with a guess of the next gradient, here the last one (arXiv:1903.01435, algorithm 2).

    The second moment is that of the gradient's difference from its guess, so that steps are long where gradients change little. AMSGrad's
    own iterate is kept behind; the weights are one guessed step further. No bias correction, no weight decay.
    """

    needs = "elementwise"
    lr: PositiveFloat = option(1e-3, "peak learning rate")
    beta1: Decay = option(0.9, "decay of the gradient average", unit="per step")
    beta2: Decay = option(0.999, "decay of the average of squared differences", unit="per step")
    eps: PositiveFloat = option(1e-8, "where that average starts: its largest value so far is never less")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return _OptimisticAMSGradRule(decay_groups(parameters), {"lr": self.lr, "betas": (self.beta1, self.beta2), "eps": self.eps})
