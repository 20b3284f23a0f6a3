"""What a data set is to the rest of gentrain."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from gentrain.config import Component, option
from gentrain.domains.base import Domain
from gentrain.noise import Noise

ENDLESS = 2**30  # more items than this are none that are held or listed: those of a toy are made when they are asked for


class CorruptItem(Exception):
    """An item that cannot be read. The message names it. The loader counts it, logs it and puts another in its place."""


class EmptySplit(ValueError):
    """No item of a data set falls into the split that was asked for. The message says what to change."""


class Items(Protocol):
    """A split of a data set: random access by index. Worker processes read it, so it can be pickled."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """{"x": float32 in [-1, 1] for images [C, H, W], any range for vectors [D]; "label": int64 []}. Raises CorruptItem."""
        ...


@runtime_checkable
class BatchItems(Items, Protocol):
    """Items that read many at once, faster than one by one, and are never corrupt: the loader needs no workers for them."""

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """indices [B] int64 -> the items stacked: {"x": [B, ...], "label": [B]}."""
        ...


@runtime_checkable
class BlockItems(Items, Protocol):
    """Items that are read a block at a time (the row group of a file): the loader shuffles blocks, and the items of some blocks together.

    Attributes:
        blocks: [B] int64, how many items each block has, in the order of the items.
        together: so many blocks, neighbours in the order of an epoch, are shuffled among each other.
    """

    blocks: Tensor
    together: int


@runtime_checkable
class BucketItems(Items, Protocol):
    """Items whose x have several shapes: those of a batch come from one bucket, whose x have one.

    Attributes:
        buckets: [N] int64, of each item.
    """

    buckets: Tensor


@dataclass(frozen=True, eq=False)
class TensorItems:
    """A split that is held in memory: x [N, C, H, W] or [N, D] float32, label [N] int64."""

    x: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "label": self.label[index]}

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        return {"x": self.x[indices], "label": self.label[indices]}


@dataclass(frozen=True, eq=False)
class CaptionedItems(TensorItems):
    """Items that also have "caption" [N] int64: the place of each one's text in the data set's `captions`."""

    caption: Tensor

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**super().__getitem__(index), "caption": self.caption[index]}

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        return {**super().batch(indices), "caption": self.caption[indices]}


class Data(Component, kind="data"):
    """A data set as configured. Reading happens in `split`; the properties are known without reading the items.

    A continuous condition (a growth rate, an income) is given as a class as well: the bin of its value, whose limits
    class_names tells (`Bins`). So null class, guidance, sampling and export work as for any label.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (C, H, W) or (D,)."""
        raise NotImplementedError

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """Those that samples to train on may have, `shape` first; each step of a run is of one of them."""
        return (self.shape,)

    @property
    def class_names(self) -> Sequence[str]:
        """One name per class, empty for data without labels."""
        raise NotImplementedError

    @property
    def captions(self) -> Sequence[str]:
        """The texts of all splits, each once; the items' "caption" says which is whose. Empty for data without texts."""
        return ()

    @property
    def domain(self) -> Domain | None:
        """The set that all of x lies in, its boundary included, for data that come with one (proportions, fluxes); else None."""
        return None

    @property
    def weighted(self) -> bool:
        """Whether items have a "weight" [] float32, by which their part of the loss is multiplied; for methods that weigh."""
        return False

    @property
    def blank(self) -> bool:
        """Whether x is 0 in all items: only its shape counts, and the labels or prompts. For methods that learn from no data."""
        return False

    @property
    def to_come(self) -> bool:
        """Whether the file is missing that tells its shape: an earlier stage of a recipe may write it."""
        return False

    @property
    def licence(self) -> str:
        """Where the data come from and under which licence: goes into the model card."""
        raise NotImplementedError

    @property
    def inputs(self) -> Sequence[str]:
        """What `augment` adds to the condition for networks that denoise, see models.inputs."""
        return ()

    def augment(self, batch: dict[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        """A batch of the train split [B, ...] as a step sees it, on its device: with changes that are drawn anew each time."""
        return batch

    def fit(self) -> None:
        """Records in the configuration what it takes from the items and a run must know for ever. Raises ValueError if it cannot."""

    def split(self, name: str) -> Items:
        """The fixed split "train" or "held_out". Raises ValueError for another name."""
        raise NotImplementedError


@dataclass
class Wrapped(Data):
    """A data set made of another one, `data`: what is not said here is as there."""

    data: Data = option(help="the data set")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        return self.data.shapes

    @property
    def class_names(self) -> Sequence[str]:
        return self.data.class_names

    @property
    def captions(self) -> Sequence[str]:
        return self.data.captions

    @property
    def domain(self) -> Domain | None:
        return self.data.domain

    @property
    def weighted(self) -> bool:
        return self.data.weighted

    @property
    def blank(self) -> bool:
        return self.data.blank

    @property
    def to_come(self) -> bool:
        return self.data.to_come

    @property
    def licence(self) -> str:
        return self.data.licence

    @property
    def inputs(self) -> Sequence[str]:
        return self.data.inputs

    def augment(self, batch: dict[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        return self.data.augment(batch, noise)

    def fit(self) -> None:
        self.data.fit()

    def split(self, name: str) -> Items:
        return self.data.split(name)


def refuse_buckets(items: Items) -> None:
    """Raises ValueError for items of several shapes, for data sets that make others of them."""
    if isinstance(items, BucketItems):
        raise ValueError("items of several shapes cannot be chosen from, marked or mixed; leave out `buckets`")


def refuse_endless(items: Items) -> None:
    """Raises ValueError for items that are made when they are asked for, and too many to look at all."""
    if len(items) > ENDLESS:
        raise ValueError("the data set has no end of items, so that none can be chosen by their classes; take it as it is")


def check_split(name: str) -> None:
    """Raises ValueError unless `name` is "train" or "held_out"."""
    if name not in ("train", "held_out"):
        raise ValueError(f"no split is called {name!r}; there are train and held_out")


def import_for(data: str, module: str, remedy: str) -> Any:
    """A package that only the data set called `data` needs. Raises ValueError with the remedy, a command, where it is not installed."""
    _require(data, module, remedy)
    return importlib.import_module(module)


def packaged_file(data: str, module: str, path: str, remedy: str) -> Path:
    """A file inside an installed package, which is not imported. Raises ValueError as `import_for` does."""
    return _require(data, module, remedy).parent / path


def _require(data: str, module: str, remedy: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"{data} is read from the package {module}, which is not installed; {remedy}")
    return Path(spec.origin)
