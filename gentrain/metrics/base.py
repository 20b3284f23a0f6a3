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


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def bootstrap_interval(
    statistic: Callable[..., float], *samples: Tensor, seed: int = 0, resamples: int = 200, level: float = 0.95
) -> Interval:
    """Bias-corrected estimate and basic (reflected) bootstrap interval; rows of each sample are drawn again independently.

    A distance between two finite samples is too large on average, and that between their resamples is so once more by about as much. Hence
    value = 2 s - mean(s*), interval = [2 s - q_high(s*), 2 s - q_low(s*)] (Efron and Tibshirani 1993, 10.2; Davison and Hinkley 1997, 5.2),
    which aim at the statistic of the whole populations, where a percentile interval would lie above it.

    Args:
        statistic: of as many tensors as there are samples.
        samples: each [N, ...].
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [[torch.randint(len(sample), (len(sample),), generator=generator) for sample in samples] for _ in range(resamples)]
    draws = torch.tensor([statistic(*(sample[row] for sample, row in zip(samples, each))) for each in rows], dtype=torch.float64)
    tail = (1 - level) / 2
    high, low = draws.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    twice = 2 * statistic(*samples)
    return Interval(twice - float(draws.mean()), twice - low, twice - high)
