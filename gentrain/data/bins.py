"""A continuous condition as classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bins:
    """Consecutive intervals of a number. `limits`, ascending: the least value, the inner limits, the largest value."""

    quantity: str
    limits: Sequence[float]

    @classmethod
    def of(cls, quantity: str, values: Tensor, count: int) -> Bins:
        """At most `count` bins that hold equally many of `values` [N]; fewer where many values are equal (1 or 2 children: two bins)."""
        inner = torch.quantile(values.double(), torch.linspace(0, 1, count + 1, dtype=torch.float64)[1:-1], interpolation="higher")
        low, high = float(values.min()), float(values.max())
        return cls(quantity, (low, *(limit for limit in inner.unique().tolist() if limit > low), high))

    def label(self, values: Tensor) -> Tensor:
        """The bin of each value, [N] int64; values beyond the ends belong to the bins at the ends, those on a limit to the bin above it."""
        return torch.bucketize(values.double().contiguous(), torch.tensor(self.limits[1:-1], dtype=torch.float64), right=True)

    @property
    def names(self) -> Sequence[str]:
        return [f"{self.quantity} {low:.4g} to {high:.4g}" for low, high in zip(self.limits, self.limits[1:])]
