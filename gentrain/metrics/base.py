"""A measured number with its uncertainty, and the bootstrap that finds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """One row of a table of results. [low, high] is a 95 % interval of what `definition` says."""

    name: str
    value: float
    low: float
    high: float
    better: Literal["lower", "higher"]
    definition: str


def proportion(name: str, hits: Tensor, better: Literal["lower", "higher"], definition: str) -> Metric:
    """The share of True in `hits` [N] bool, N > 0, with Wilson's 95 % interval (Wilson 1927)."""
    from scipy.stats import binomtest

    test = binomtest(int(hits.sum()), len(hits))
    low, high = test.proportion_ci(method="wilson")
    return Metric(name, float(test.statistic), float(low), float(high), better, definition)


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def bootstrap_interval(
    statistic: Callable[..., float], *samples: Tensor, seed: int = 0, resamples: int = 100, level: float = 0.95
) -> Interval:
    """Bias-corrected estimate and bootstrap interval; rows of each sample are drawn again independently.

    A distance between two finite samples is too large on average, and that between their resamples s* is so once more by about as much:
    bias = mean(s*) - s (Efron and Tibshirani 1993, 10.2). So value = s - bias, and the quantiles of s* are moved by twice the bias, onto
    the value. Both aim at the statistic of the whole populations, which a plain percentile interval would lie above. Unlike the basic
    (reflected) interval this one keeps the skew of s* and covers near 0 too. The statistic must be smooth: no root that may come near 0.

    Args:
        statistic: of as many tensors as there are samples.
        samples: each [N, ...].
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.empty(resamples, dtype=torch.float64)
    for number in range(resamples):
        draws[number] = statistic(*(sample[torch.randint(len(sample), (len(sample),), generator=generator)] for sample in samples))
    estimate = statistic(*samples)
    bias = float(draws.mean()) - estimate
    tail = (1 - level) / 2
    low, high = (draws.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)) - 2 * bias).tolist()
    return Interval(estimate - bias, low, high)
