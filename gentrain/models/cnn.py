"""Convolutional classifier: the judge of generated images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import PositiveInt
from torch import Tensor, nn

from gentrain.config import option, register
from gentrain.models.base import Model

FEATURES = 128


@register("cnn")
@dataclass
class CNN(Model):
    """Convolutions with group normalisation and pooling, then 128 features, then logits."""

    classifies: ClassVar[bool] = True
    decoded: ClassVar[bool] = True

    channels: tuple[PositiveInt, ...] = option((16, 32), "channels of each level; each level after the first halves the grid")
    norm_groups: PositiveInt = option(8, "groups of the group normalisation; divides every level's channels")

    def __post_init__(self) -> None:
        if not self.channels:
            raise ValueError("channels is empty; name at least one level, such as [16, 32]")
        if wrong := [width for width in self.channels if width % self.norm_groups]:
            raise ValueError(f"channels {wrong[0]} is not divisible by norm_groups {self.norm_groups}; change one of them")

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Raises ValueError when shape is not (C, H, W) with H, W >= 2^levels, or there are no classes."""
        if len(shape) != 3:
            raise ValueError(f"cnn is for images (C, H, W), got samples of shape {shape}")
        if min(shape[1:]) < 2 ** len(self.channels):
            raise ValueError(f"images of {shape[1]}x{shape[2]} pixels are too small to halve {len(self.channels)} times; shorten channels")
        if num_classes < 2:
            raise ValueError(f"cnn is a classifier and needs data with classes, got {num_classes}")
        return Classifier(shape[0], num_classes, self.channels, self.norm_groups)


class Classifier(nn.Module):
    """forward: x [B, C, H, W] in [-1, 1] -> logits [B, num_classes]; features: -> [B, 128], the last layer's input."""

    def __init__(self, in_channels: int, num_classes: int, channels: tuple[int, ...], norm_groups: int):
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((in_channels, *channels), channels, strict=False):
            for inputs in (before, width):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.GroupNorm(norm_groups, width), nn.SiLU()]
            layers.append(nn.MaxPool2d(2))
        self.convolutions = nn.Sequential(*layers)
        # the grid is kept, for digits differ by where strokes are; 4x4 whatever the image's size
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(channels[-1] * 16, FEATURES), nn.SiLU())
        self.logits = nn.Linear(FEATURES, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.hidden(self.pool(self.convolutions(x.to(self.logits.weight.dtype))))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))
