"""Two-dimensional toy distributions with class labels. Item i is a function of (seed, split, i), so there is no end of fresh items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from gentrain.config import option, register
from gentrain.data.base import Data, check_split
from gentrain.noise import Noise, derive

UNLIMITED = 2**40  # a run never comes to the second epoch


@dataclass(frozen=True, eq=False)
class ToyItems:
    """A split of a toy: `count` items, made when asked for."""

    toy: Toy
    seed: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.batch(torch.tensor([index])).items()}

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        noise = Noise(self.seed, indices)
        label = noise.randint(0, len(self.toy.class_names), (len(indices),))
        return {"x": self.toy.draw(label, noise), "label": label}


@dataclass
class Toy(Data):
    """Base of the toys: classes are equally likely, all points lie in or near [-1, 1]^2."""

    seed: int = option(0, "another seed, other items")
    held_out: PositiveInt = option(2_000, "items of the held-out split; the train split has no end", unit="items")

    @property
    def shape(self) -> tuple[int, ...]:
        return (2,)

    @property
    def licence(self) -> str:
        return "synthetic points, no rights reserved"

    @property
    def class_names(self) -> Sequence[str]:
        return [f"{self.registered_name} {number}" for number in range(self.class_count())]

    def class_count(self) -> int:
        raise NotImplementedError

    def draw(self, label: Tensor, noise: Noise) -> Tensor:
        """Points of the given classes: label [B] int64 -> x [B, 2] float32."""
        raise NotImplementedError

    def split(self, name: str) -> ToyItems:
        check_split(name)
        return ToyItems(self, derive(self.seed, name), self.held_out if name == "held_out" else UNLIMITED)


@register("rings")
@dataclass
class Rings(Toy):
    """Concentric circles of radius (label + 1) / rings, uniform in angle, blurred by a normal law."""

    rings: PositiveInt = option(3, "number of circles, the outermost of radius 1; one class each")
    std: NonNegativeFloat = option(0.03, "standard deviation of the blur, per coordinate")

    def class_count(self) -> int:
        return self.rings

    def draw(self, label: Tensor, noise: Noise) -> Tensor:
        radius = (label + 1) / self.rings
        return _polar(radius, noise.uniform(label.shape, 0, 2 * math.pi)) + self.std * noise.normal((len(label), 2))


@register("spiral")
@dataclass
class Spiral(Toy):
    """Arms that wind from the centre to radius 1: angle = 2 pi (turns * radius + label / arms), radius^2 uniform, blurred."""

    arms: PositiveInt = option(2, "number of arms; one class each")
    turns: PositiveFloat = option(1.5, "how often an arm winds around the centre", unit="turns")
    std: NonNegativeFloat = option(0.02, "standard deviation of the blur, per coordinate")

    def class_count(self) -> int:
        return self.arms

    def draw(self, label: Tensor, noise: Noise) -> Tensor:
        radius = noise.uniform(label.shape).sqrt()
        angle = 2 * math.pi * (self.turns * radius + label / self.arms)
        return _polar(radius, angle) + self.std * noise.normal((len(label), 2))


@register("mixture")
@dataclass
class Mixture(Toy):
    """Equal normal laws, isotropic, with means at equal distances on a circle: mean k = radius (cos, sin)(2 pi k / components)."""

    components: PositiveInt = option(8, "number of normal laws; one class each")
    radius: PositiveFloat = option(0.8, "of the circle of means")
    std: NonNegativeFloat = option(0.08, "standard deviation of each law, per coordinate")

    def class_count(self) -> int:
        return self.components

    def draw(self, label: Tensor, noise: Noise) -> Tensor:
        mean = _polar(torch.full(label.shape, self.radius), label * (2 * math.pi / self.components))
        return mean + self.std * noise.normal((len(label), 2))


@register("checkerboard")
@dataclass
class Checkerboard(Toy):
    """Uniform on the dark squares of a board that fills [-1, 1]^2: sharp edges, many modes."""

    squares: PositiveInt = option(4, "squares along a side; one class per dark square, counted row by row from the lower left")

    def class_count(self) -> int:
        return (self.squares**2 + 1) // 2

    def draw(self, label: Tensor, noise: Noise) -> Tensor:
        column, row = torch.arange(self.squares).repeat(self.squares), torch.arange(self.squares).repeat_interleave(self.squares)
        dark = torch.stack([column, row], 1)[(column + row) % 2 == 0]
        return (dark[label] + noise.uniform((len(label), 2))) * (2 / self.squares) - 1


def _polar(radius: Tensor, angle: Tensor) -> Tensor:
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
