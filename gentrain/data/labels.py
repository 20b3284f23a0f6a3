"""Labels without data, for the methods that need none: the shape of a sample and the names of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import PositiveInt
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data, Items, check_split
from gentrain.data.toys import UNLIMITED
from gentrain.noise import Noise, derive


@dataclass(frozen=True)
class _LabelItems:
    shape: tuple[int, ...]
    classes: int
    seed: int

    def __len__(self) -> int:
        return UNLIMITED

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.batch(torch.tensor([index])).items()}

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        label = Noise(self.seed, indices).randint(0, self.classes, (len(indices),))
        return {"x": torch.zeros(len(indices), *self.shape), "label": label}


@register("labels")
@dataclass
class Labels(Data):
    """Classes, all equally likely, and no data: x is 0. For a model whose training data are not at hand (`sfd`, `esd`)."""

    size: list[PositiveInt] = option(help="shape of a sample: [C, H, W] or [D]")
    classes: list[str] = option(help="names of the classes, in the order of the model's labels")

    def __post_init__(self) -> None:
        if len(self.size) not in (1, 3):
            raise ConfigError(f"expected [C, H, W] or [D], got {self.size}", key="size")
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ConfigError("expected at least one name, and none of them twice", key="classes")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.size)

    @property
    def class_names(self) -> Sequence[str]:
        return self.classes

    @property
    def blank(self) -> bool:
        return True

    @property
    def licence(self) -> str:
        return "no data were read: the data of the model that this one was made from are described there"

    def split(self, name: str) -> Items:
        check_split(name)
        return _LabelItems(self.shape, len(self.classes), derive(0, "labels", name))
