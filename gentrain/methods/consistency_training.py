"""Consistency training: a consistency function without a teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from gentrain.config import Fraction, option, register
from gentrain.methods.base import Batch, Clock, Loss, Nets, Role, Trained, Update, condition_of
from gentrain.methods.consistency import DISTANCES, ConsistencyFunction, Distance, doubling_intervals, same_dropout, time_of_ratio
from gentrain.models.denoiser import drop_condition
from gentrain.noise import Noise

MOST_INTERVALS = 1_000_000


def karras_levels(intervals: int, lowest: float, highest: float, rho: float = 7.0) -> Tensor:
    """[intervals + 1] ascending float64 noise levels, equally spaced in level^(1 / rho) (arXiv:2206.00364, eq. 5)."""
    position = torch.linspace(0, 1, intervals + 1, dtype=torch.float64)
    return (lowest ** (1 / rho) + position * (highest ** (1 / rho) - lowest ** (1 / rho))) ** rho


def interval_probabilities(levels: Tensor, mean: float, std: float) -> Tensor:
    """Of the intervals between ascending levels [N + 1]: N(mean, std^2) of the level's logarithm, cut off and normalised: [N].

    arXiv:2310.14189, eq. 10.
    """
    mass = torch.erf((levels.log() - mean) / (2**0.5 * std)).diff()
    return mass / mass.sum()


@register("consistency_training")
@dataclass
class ConsistencyTraining(ConsistencyFunction):
    """Improved consistency training (iCT, arXiv:2310.14189): neighbouring points of one line of noise must have the same end.

    x_t and x_s share data and noise; the loss d(f(x_t, t), sg f(x_s, s)) / (t - s) is counted in noise levels sigma / alpha, so that any
    path will do. The target is the network itself, without an average; d is the pseudo-Huber norm of a row; the grid of levels doubles
    its intervals in equal parts of the run.
    """

    roles: ClassVar[dict[str, Role]] = {"model": Trained(ema=True)}
    generator: ClassVar[str | None] = "model"

    first_intervals: PositiveInt = option(10, "of the grid at the start", source="arXiv:2310.14189, section 3.4")
    last_intervals: PositiveInt = option(1280, "at most", source="arXiv:2310.14189, section 3.4")
    lowest: PositiveFloat = option(0.002, "noise level", source="arXiv:2310.14189, table 1")
    highest: PositiveFloat = option(80.0, "noise level", source="arXiv:2310.14189, table 1")
    mean: float = option(-1.1, "of the log-normal law of levels", source="arXiv:2310.14189, section 3.5")
    std: PositiveFloat = option(2.0, "of the log-normal law of levels", source="arXiv:2310.14189, section 3.5")
    distance: Distance = option("huber", "pseudo-Huber norm of a row, or its square, whose optimum is the mean in few coordinates, too")
    label_dropout: Fraction = option(0.0, "probability that a label becomes the null class")

    def __post_init__(self) -> None:
        if self.first_intervals > self.last_intervals:
            raise ValueError(f"first_intervals {self.first_intervals} must not exceed last_intervals {self.last_intervals}")
        if self.lowest >= self.highest:
            raise ValueError(f"lowest {self.lowest:g} must be below highest {self.highest:g}")
        if self.last_intervals > MOST_INTERVALS:
            said = f"neighbours of {self.last_intervals} intervals are one time in float32; take at most {MOST_INTERVALS} (1280 is usual)"
            raise ValueError(said)
        if not interval_probabilities(karras_levels(self.first_intervals, self.lowest, self.highest), self.mean, self.std).isfinite().all():
            raise ValueError(
                f"a law of levels of mean {self.mean:g} and std {self.std:g} never comes between {self.lowest:g} and {self.highest:g}; "
                f"mean is that of the level's logarithm, choose it in {math.log(self.lowest):.1f} to {math.log(self.highest):.1f}"
            )

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("model", partial(self.loss, doubling_intervals(clock.progress, self.first_intervals, self.last_intervals)))

    def loss(self, intervals: int, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        path, condition = nets.model.path, condition_of(batch)
        x0 = path.space.encode(batch["x"])
        levels = karras_levels(intervals, self.lowest, self.highest).to(x0.device)
        times = time_of_ratio(path, levels).to(x0)
        times[-1] = path.t_max  # where samplers begin, be it pure noise
        cumulative = interval_probabilities(levels, self.mean, self.std).cumsum(0)
        index = torch.searchsorted(cumulative, noise.uniform((len(x0),)).to(cumulative)).clamp(max=intervals - 1)
        if condition is not None and self.label_dropout:
            condition = drop_condition(condition, noise.bernoulli(self.label_dropout, (len(x0),)))
        eps = path.draw_eps(noise, tuple(x0.shape))
        s, t = times[index], times[index + 1]
        x_s, x_t = path.perturb(x0, eps, s), path.perturb(x0, eps, t)
        with torch.no_grad(), same_dropout(x0):
            target = nets.model.x0(x_s, s, condition)
        loss = DISTANCES[self.distance](nets.model.x0(x_t, t, condition), target) / levels.diff()[index].to(x0)
        return Loss(loss.mean(), {"intervals": torch.tensor(float(intervals))})
