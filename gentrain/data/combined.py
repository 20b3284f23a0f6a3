"""Several data sets as one, in given proportions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import PositiveFloat
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.data.base import BlockItems, Data, Items, check_split, refuse_buckets

_LONGEST = 2**40  # items of an epoch, of which toys have no end


@dataclass
class Part:
    """One of the data sets of several."""

    data: Data = option(help="the data set")
    weight: PositiveFloat = option(1.0, "share of the samples, over the sum of all weights")


@dataclass(frozen=True, eq=False)
class MixedItems:
    """An epoch in which part k has `counts`[k] places in a row, its items one after the other, over and over.

    Args:
        labels: [parts][classes of the part] -> class of all.
    """

    parts: Sequence[Items]
    counts: Sequence[int]
    labels: Sequence[Tensor]

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        for items, count, labels in zip(self.parts, self.counts, self.labels, strict=True):
            if index < count:
                item = items[index % len(items)]
                return {**item, "label": labels[item["label"]] if len(labels) else item["label"]}
            index -= count
        raise IndexError(index)


def places(weights: Sequence[float], lengths: Sequence[int]) -> list[int]:
    """How many places of an epoch each part gets: in proportion to its weight, so that no item of any part is left out.

    The part that is longest for its weight has as many as it has items.
    """
    epoch = max(length / weight for length, weight in zip(lengths, weights, strict=True))
    return [max(1, round(epoch * weight)) for weight in weights]


@register("combined")
@dataclass
class Combined(Data):
    """Several data sets of one shape, each with its weight: every epoch has exactly these proportions, in an order that mixes all.

    The part that is longest for its weight comes once an epoch, the others as often as it takes. Classes of one name are one class.
    """

    parts: list[Part] = option(help="data sets and their weights")

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ConfigError("name at least two data sets", key="parts")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].data.shape

    @property
    def class_names(self) -> Sequence[str]:
        return list(dict.fromkeys(name for part in self.parts for name in part.data.class_names))

    @property
    def blank(self) -> bool:
        return any(part.data.blank for part in self.parts)

    @property
    def weighted(self) -> bool:
        return any(part.data.weighted for part in self.parts)

    @property
    def licence(self) -> str:
        return "; ".join(dict.fromkeys(part.data.licence for part in self.parts))

    def fit(self) -> None:
        for number, part in enumerate(self.parts):
            part.data.fit()
            if part.data.shape != self.shape:
                raise ConfigError(f"its samples are {part.data.shape}, those of the first part {self.shape}", key=f"data.parts[{number}]")
            if bool(part.data.class_names) != bool(self.class_names):
                raise ConfigError("either every part has classes or none has", key=f"data.parts[{number}]")
            if part.data.captions or part.data.inputs or part.data.weighted != self.weighted:
                raise ConfigError(
                    "parts cannot have captions, augmentation (augment all of them) or, unless all have them, weights",
                    key=f"data.parts[{number}]",
                )

    def split(self, name: str) -> MixedItems:
        check_split(name)
        items = [part.data.split(name) for part in self.parts]
        for each in items:
            refuse_buckets(each)
        if any(isinstance(each, BlockItems) for each in items):
            raise ValueError("items that are read block by block cannot be mixed; set streaming of that part to false")
        number = {each: index for index, each in enumerate(self.class_names)}
        labels = [torch.tensor([number[each] for each in part.data.class_names], dtype=torch.int64) for part in self.parts]
        counts = places([part.weight for part in self.parts], [min(len(each), _LONGEST) for each in items])
        if name == "held_out":
            counts = [len(each) for each in items]
        return MixedItems(items, counts, labels)
