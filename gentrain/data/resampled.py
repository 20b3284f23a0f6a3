"""A data set some of whose classes come more often, or count for more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.data.base import ENDLESS, BatchItems, BlockItems, Items, Wrapped, check_split, refuse_buckets, refuse_endless
from gentrain.data.loader import order


def labels_of(items: Items) -> Tensor:
    """[N] int64. Reads every item where the labels are not at hand."""
    for name in ("label", "labels"):
        known = getattr(items, name, None)
        if isinstance(known, Tensor) and known.shape == (len(items),):
            return known
    return torch.stack([items[index]["label"] for index in range(len(items))])


def repeated(labels: Tensor, factors: Tensor) -> Tensor:
    """The items of an epoch in which those of class c come factors[c] times: labels [N] int64, factors [C] >= 0 -> [M] int64 items.

    Of a fractional part, as many items of the class come once more as it says, the same ones each epoch.
    """
    chosen = []
    for c, factor in enumerate(factors.tolist()):
        rows = (labels == c).nonzero()[:, 0]
        if len(rows):
            more = round((factor - int(factor)) * len(rows))
            chosen += [rows.repeat(int(factor)), rows[order(c, len(rows), torch.arange(more))]]
    return torch.cat(chosen)


@dataclass(frozen=True, eq=False)
class _Picked:
    """Items `rows` [M] of others, and the weight [M] of each if there are weights."""

    items: Items
    rows: Tensor
    weight: Tensor | None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._weighed(self.items[int(self.rows[index])], index)

    def _weighed(self, found: dict[str, Tensor], index: Tensor | int) -> dict[str, Tensor]:
        return found if self.weight is None else {**found, "weight": self.weight[index] * found.get("weight", 1.0)}


class _PickedBatches(_Picked):
    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        return self._weighed(self.items.batch(self.rows[indices]), indices)  # type: ignore[attr-defined]


@register("resampled")
@dataclass
class Resampled(Wrapped):
    """Another data set whose classes come more or less often while it is trained on; what is held out stays as it is.

    balance `classes`: each as often as the largest. `repeat_factor`: an item of a class with share f of the data comes
    max(1, sqrt(threshold / f)) times (arXiv:1908.03195, appendix B). `given`: as `repeat` says. With `unbiased`, an item's part of the loss
    is divided by how often it comes: the expected gradient is that of the data as they are, and rare classes are merely seen more evenly.
    """

    balance: Literal["classes", "repeat_factor", "given"] = option("classes", "how often items of each class come")
    threshold: PositiveFloat = option(0.001, "of repeat_factor: classes with a smaller share are repeated", source="arXiv:1908.03195")
    repeat: dict[str, NonNegativeFloat] = option(dict, "of `given`: class -> how often its items come in an epoch; others come once")
    unbiased: bool = option(False, "divide the loss of an item by how often it comes")
    weights: dict[str, NonNegativeFloat] = option(dict, "class -> what the loss of its items is multiplied by; those not named count 1")

    def __post_init__(self) -> None:
        if (self.balance == "given") != bool(self.repeat):
            raise ConfigError("`repeat` says how often classes come with balance: given, and only then", key="repeat")

    @property
    def weighted(self) -> bool:
        return self.unbiased or bool(self.weights) or self.data.weighted

    def fit(self) -> None:
        super().fit()
        for key, given in (("repeat", self.repeat), ("weights", self.weights)):
            if unknown := set(given) - set(self.class_names):
                raise ConfigError(f"there is no class {min(unknown)!r}; the classes: {', '.join(self.class_names)}", key=f"data.{key}")
        if not len(self.class_names):
            raise ValueError("these data have no classes to be balanced")

    def split(self, name: str) -> Items:
        check_split(name)
        items = self.data.split(name)
        if name == "held_out":
            return items
        refuse_buckets(items)
        refuse_endless(items)
        if isinstance(items, BlockItems):
            raise ValueError("items that are read block by block cannot be repeated; set data.data.streaming to false")
        labels = labels_of(items)
        if int(labels.min()) < 0:
            raise ValueError("some items have no class, so that classes cannot be balanced")
        counts = torch.bincount(labels, minlength=len(self.class_names))
        factors = self._factors(counts)
        if float(counts.double() @ factors.double()) > ENDLESS:
            raise ValueError(f"an epoch would have more than {ENDLESS} items; lower data.repeat")
        rows = repeated(labels, factors)
        if not len(rows):
            raise ValueError("no item comes at all; raise data.repeat")
        picked = _PickedBatches if isinstance(items, BatchItems) else _Picked
        weights = self._weights(factors, len(rows) / len(items))
        return picked(items, rows, weights[labels[rows]] if self.weighted else None)

    def _factors(self, counts: Tensor) -> Tensor:
        """counts [C] of items -> how often those of each class come [C]."""
        if self.balance == "given":
            return torch.tensor([self.repeat.get(name, 1.0) for name in self.class_names])
        share = counts.clamp(min=1) / counts.sum()
        return share.max() / share if self.balance == "classes" else (self.threshold / share).sqrt().clamp(min=1)

    def _weights(self, factors: Tensor, longer: float) -> Tensor:
        """[C]. longer: items of an epoch, over those of the data: the mean of the weights that `unbiased` gives is 1."""
        given = torch.tensor([self.weights.get(name, 1.0) for name in self.class_names])
        return longer * given / factors if self.unbiased else given
