"""ZO-RankSGD: a generator led by an oracle that only says which of its samples are better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Protocol

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from gentrain.config import ConfigError, Fraction, option, register
from gentrain.methods.base import Batch, Loss, Nets
from gentrain.methods.rewarded import score
from gentrain.methods.rollout import RewardedRollout, draws_of
from gentrain.noise import Noise
from gentrain.paths.base import expand


class Oracle(Protocol):
    def __call__(self, candidates: Tensor, named: int) -> Tensor:
        """candidates [m, B, ...] -> values [m, B], of which the order of the `named` highest is used, in each row."""


def rank_gradient(directions: Tensor, values: Tensor, best: int) -> Tensor:
    """The estimate of an ascent direction from which candidates are better (arXiv:2303.03751, eq. 5): [m, B, ...], [m, B] -> [B, ...].

    The mean of xi_a - xi_b over all pairs of which the oracle says that a is better than b, when it names the `best` first of m in order:
    best (best - 1) / 2 + best (m - best) pairs. The direction of rank r (0 = best) counts m - 1 - 2 r times, those after the named -best.
    """
    count = len(directions)
    order = values.argsort(dim=0, descending=True, stable=True)
    ranks = torch.arange(count, device=values.device)
    weights = torch.where(ranks < best, count - 1 - 2 * ranks, -best).to(directions)
    pairs = best * (best - 1) / 2 + best * (count - best)
    place = torch.empty_like(order).scatter_(0, order, ranks[:, None].expand_as(order))
    signed = weights[place].reshape(*values.shape, *[1] * (directions.ndim - 2))
    return (signed * directions).sum(0) / pairs


def line_search(x: Tensor, ascent: Tensor, oracle: Callable[[Tensor], Tensor], rate: float, shrink: float, tries: int) -> Tensor:
    """The best of x and x + rate shrink^j ascent, j = 0 .. tries - 1, of each row: [B, ...] -> [B, ...]. It is never worse than x."""
    candidates = torch.stack([x, *(x + rate * shrink**j * ascent for j in range(tries))])
    best = oracle(candidates).argmax(0)
    return candidates[best, torch.arange(len(x), device=x.device)]


@dataclass(kw_only=True)
class Search:
    """The settings of ZO-RankSGD, and its steps."""

    candidates: Annotated[int, Field(ge=2)] = option(8, "m, that the oracle sees at once", source="arXiv:2303.03751, section 4")
    best: PositiveInt = option(4, "k, how many of them it names, in order")
    radius: PositiveFloat = option(0.3, "mu, deviation of the candidates about the current x, in units of x, such as the noise's")
    rate: PositiveFloat = option(1.0, "first step of the line search, in units of x, along the estimate at length sqrt(D)")
    shrink: Fraction = option(0.5, "factor from one step that is tried to the next")
    tries: PositiveInt = option(3, "l, steps that are tried")
    rounds: PositiveInt = option(1, "of the search")

    def check_search(self) -> None:
        """Raises ConfigError when more are to be named than there are."""
        if self.best > self.candidates:
            raise ConfigError(f"there are {self.candidates} candidates; name at most that many", key="best")

    def search(self, x: Tensor, oracle: Oracle, noise: Noise) -> Tensor:
        """What `rounds` steps find from x [B, ...]; no row is worse than it was, by the oracle. noise: of B rows."""
        for _ in range(self.rounds):
            directions = torch.stack([noise.normal(tuple(x.shape), dtype=x.dtype) for _ in range(self.candidates)])
            ascent = rank_gradient(directions, oracle(x + self.radius * directions, self.best), self.best)
            length = ascent.flatten(1).norm(dim=1).clamp(min=1e-12) / x[0].numel() ** 0.5
            x = line_search(x, ascent / expand(length, x), partial(oracle, named=1), self.rate, self.shrink, self.tries)
        return x


@register("zo_rank")
@dataclass
class ZORank(RewardedRollout, Search):
    """ZO-RankSGD (arXiv:2303.03751) over the initial noise of a few-step generator, and its finds taught to the generator.

    From each sample's initial noise x_1 the search takes `rounds` steps: it draws `candidates` samples from noise nearby, all other noise
    of the roll-out being the same, moves along `rank_gradient`, and keeps the best of a line search, x_1 itself included. Then the model
    learns to draw from x_1 what it drew from the noise found: it descends the mean squared difference. Only the order of rewards is used,
    so that any increasing function of them teaches the same. Weights themselves are not perturbed: a method does not see them; the stage
    `rank_search` does that, and asks a person.
    """

    follows_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_search()

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        draws = draws_of(self.sampler, batch, noise)
        with torch.no_grad():
            found = self._search(nets, batch, draws, noise)
            target = self.roll(nets.model, batch, [found, *draws[1:]])[-1][1].x0
            rewards = score(self.reward, nets, nets.model.path, target, batch)
        x0 = self.roll(nets.model, batch, draws)[-1][1].x0
        with torch.no_grad():
            before = score(self.reward, nets, nets.model.path, x0, batch)
        better = (rewards > before).float().mean()
        return Loss((x0 - target).square().mean(), {"reward": before.mean(), "reward_found": rewards.mean(), "better": better})

    def _search(self, nets: Nets, batch: Batch, draws: list[Tensor], noise: Noise) -> Tensor:
        """Initial noise [B, ...] whose samples the oracle prefers to those of draws[0]."""

        def oracle(candidates: Tensor, named: int) -> Tensor:
            samples = (self.roll(nets.model, batch, [each, *draws[1:]])[-1][1].x0 for each in candidates)
            return torch.stack([score(self.reward, nets, nets.model.path, sample, batch) for sample in samples])

        return self.search(draws[0], oracle, noise)
