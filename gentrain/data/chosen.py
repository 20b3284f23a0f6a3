"""A data set without some of its classes, or with a few items of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import PositiveInt

from gentrain.config import ConfigError, option, register
from gentrain.data.base import BatchItems, Data, Items, TensorItems, refuse_buckets, refuse_endless
from gentrain.domains.base import Domain


@register("chosen")
@dataclass
class Chosen(Data):
    """A data set with the items of some classes only: for retraining without a class, or teaching it again.

    The classes keep their numbers and names, so that weights of the whole data set fit. The items are held in memory.
    """

    data: Data = option(help="the whole data set")
    classes: list[int] | None = option(None, "numbers of the classes that stay; null = all but those left out")
    leave_out: list[int] = option(list, "numbers of the classes that go")
    count: PositiveInt | None = option(None, "items of the train split that stay, at most; null = all", unit="items")

    def __post_init__(self) -> None:
        if self.classes is not None and self.leave_out:
            raise ConfigError("name the classes that stay or those that go, not both", key="leave_out")
        if not self._kept():
            raise ConfigError("no class is left", key="classes" if self.classes is not None else "leave_out")

    def _kept(self) -> list[int]:
        known = range(len(self.data.class_names))
        for key, given in (("classes", self.classes or []), ("leave_out", self.leave_out)):
            if wrong := [number for number in given if number not in known]:
                raise ConfigError(f"there is no class {wrong[0]}; the classes are 0 to {len(known) - 1}", key=key)
        return [number for number in (self.classes if self.classes is not None else known) if number not in self.leave_out]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def class_names(self) -> Sequence[str]:
        return self.data.class_names

    @property
    def domain(self) -> Domain | None:
        return self.data.domain

    @property
    def licence(self) -> str:
        return self.data.licence

    def fit(self) -> None:
        self.data.fit()

    def split(self, name: str) -> Items:
        items = self.data.split(name)
        refuse_buckets(items)
        refuse_endless(items)
        everything = torch.arange(len(items))
        batch = items.batch(everything) if isinstance(items, BatchItems) else _stacked(items)
        rows = torch.isin(batch["label"], torch.tensor(self._kept())).nonzero()[:, 0]
        rows = rows[: self.count] if name == "train" else rows
        return TensorItems(batch["x"][rows], batch["label"][rows])


def _stacked(items: Items) -> dict[str, torch.Tensor]:
    return torch.utils.data.default_collate([items[index] for index in range(len(items))])
