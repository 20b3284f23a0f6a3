"""Whether samples carry a watermark, and how often samples without one would seem to."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gentrain.domains.orthonormal_slabs import OrthonormalSlabs
from gentrain.metrics.base import Metric, proportion


def rows_inside(x: Tensor, slabs: OrthonormalSlabs) -> Tensor:
    """How many coordinates of A x lie in their slabs: [B, ...] -> [B] int64. All of them in what the model generates, before rounding."""
    below, above = slabs.slack(x.double()).chunk(2, 1)
    return ((below > 0) & (above > 0)).sum(1)


def false_positive_rate(inside: Tensor, rows: int, coverage: float) -> Tensor:
    """Probability that a sample without the watermark has at least `inside` of `rows` coordinates in their slabs: [B] -> [B] float64.

    Of a binomial law: each coordinate of unmarked data is inside with probability `coverage`, independently. The rows are random
    directions, but data whose variance lies in few directions make them depend on each other: check the rate on unmarked data.
    """
    from scipy.stats import binom

    return torch.from_numpy(binom.sf(inside.cpu().numpy() - 1, rows, coverage))


def eight_bits(x: Tensor) -> Tensor:
    """What is left of images in [-1, 1] after they were saved with 256 levels."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def detection(name: str, detected: Tensor, better: Literal["lower", "higher"], rate: float) -> Metric:
    """The share of samples in which a watermark is detected ([N] bool), with its interval."""
    definition = f"part of {len(detected)} samples that by chance would have as many coordinates inside with probability {rate:g} at most"
    return proportion(name, detected, better, definition)
