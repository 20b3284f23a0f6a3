"""A data set whose classes nobody is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gentrain.config import register
from gentrain.data.base import Wrapped
from gentrain.noise import Noise


@register("unlabelled")
@dataclass
class Unlabelled(Wrapped):
    """Another data set without its classes: networks are built for none, and samples are drawn of all of them."""

    @property
    def class_names(self) -> Sequence[str]:
        return ()

    def augment(self, batch: dict[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        return {key: value for key, value in super().augment(batch, noise).items() if key != "label"}
