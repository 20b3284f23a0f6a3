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


def false_positive_rate(inside: Tensor, rows: int) -> Tensor:
    """Bound of the probability that a sample made without the key has at least `inside` of `rows` coordinates in slabs: [B] -> [B] float64.

    P(Binomial(rows, 1/2) >= inside). A key lays each slab to one side of the data's mean, by a fair coin of its own (`make_key`): given
    the sample, the directions and the bounds, row i can be inside only if its coin fell to the side on which (A x)_i is. The coins are
    independent of each other and of a sample made without the key, so that the bound holds of any such sample, blank ones included.
    """
    from scipy.stats import binom

    return torch.from_numpy(binom.sf(inside.cpu().numpy() - 1, rows, 0.5))


def eight_bits(x: Tensor) -> Tensor:
    """What is left of images in [-1, 1] after they were saved with 256 levels."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def detection(name: str, detected: Tensor, better: Literal["lower", "higher"], rate: float) -> Metric:
    """The share of samples in which a watermark is detected ([N] bool), with its interval."""
    definition = f"part of {len(detected)} samples with so many coordinates inside that chance has probability {rate:g} at most"
    return proportion(name, detected, better, definition)
