"""What a data set is to the rest of gentrain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from gentrain.config import Component


class CorruptItem(Exception):
    """An item that cannot be read. The message names it. The loader counts it, logs it and puts another in its place."""


class Items(Protocol):
    """A split of a data set: random access by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """{"x": float32 in [-1, 1] for images [C, H, W], any range for vectors [D]; "label": int64 []}. Raises CorruptItem."""
        ...


class Data(Component, kind="data"):
    """A data set as configured. Reading happens in `split`; the properties are known without reading the items."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (C, H, W) or (D,)."""
        raise NotImplementedError

    @property
    def class_names(self) -> Sequence[str]:
        """One name per class, empty for data without labels."""
        raise NotImplementedError

    @property
    def licence(self) -> str:
        """Where the data come from and under which licence: goes into the model card."""
        raise NotImplementedError

    def split(self, name: str) -> Items:
        """The fixed split "train" or "held_out"."""
        raise NotImplementedError
