"""A user's plugin: 24 pictures and 3 held-out ones with captions, read one by one; the fourth is torn, and whoever reads the twelfth first
is killed."""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gentrain.config import option, register
from gentrain.data.base import CorruptItem, Data


@register("plugin_pictures")
@dataclass
class Pictures(Data):
    """Numbers and their pictures."""

    marker: str = option("", "file that is there when nobody is to be killed")

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, 6, 6)

    @property
    def class_names(self) -> Sequence[str]:
        return ()

    @property
    def captions(self) -> Sequence[str]:
        return [chr(ord("a") + number) for number in range(24)]

    @property
    def licence(self) -> str:
        return "made up"

    def split(self, name: str) -> "Items":
        return Items(24 if name == "train" else 3, Path(self.marker))


@dataclass
class Items:
    """So many pictures."""

    count: int
    marker: Path

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == 3 and self.count == 24:
            raise CorruptItem("picture 3 is torn")
        if index == 11 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"x": torch.full((3, 6, 6), index / 24), "label": torch.tensor(-1), "caption": torch.tensor(index)}
