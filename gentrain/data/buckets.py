"""Images of several proportions: each comes out in the shape, of those of about one area, that is nearest to its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, PositiveInt

from gentrain.config import ConfigError, option

Side = tuple[int, int]  # height, width, in pixels


@dataclass
class Buckets:
    """The shapes beside the square, for training. Every step of a run is of one shape, on all ranks."""

    step: PositiveInt = option(64, "sides are multiples of it", unit="pixels")
    ratio: Annotated[float, Field(ge=1, le=16)] = option(4.0, "largest ratio of the sides")
    tolerance: Annotated[float, Field(ge=0, lt=0.5)] = option(
        0.0, "share of the square's pixels, and so of its tokens, that the others may lack; 0 = all have exactly as many"
    )

    def shapes(self, size: int) -> list[Side]:
        """The shapes for squares of `size` pixels: the square, then the others from the widest to the tallest. Raises ConfigError."""
        if size % self.step:
            raise ConfigError(f"the size of {size} pixels is no multiple of {self.step}; choose a divisor of it", key="step")
        found = []
        for height in range(self.step, math.ceil(size * math.sqrt(self.ratio)) + 1, self.step):
            width = size**2 // height // self.step * self.step
            if not width or size**2 // width // self.step * self.step != height:  # no side of it can be longer
                continue
            lacks = 1 - height * width / size**2
            if lacks <= self.tolerance and max(height, width) <= self.ratio * min(height, width) and height != width:
                found.append((height, width))
        if not found:
            raise ConfigError(
                f"no two multiples of {self.step} have the product {size}**2 within a tolerance of {self.tolerance:g} and a ratio of "
                f"{self.ratio:g}; raise one of these, or take a size with more divisors, such as {self._better(size)}",
                key="tolerance",
            )
        return [(size, size), *found]

    def _better(self, size: int) -> str:
        """Sizes near this one of which there are other shapes without tolerance."""
        count = size // self.step

        def has_others(side: int) -> bool:
            return any(side**2 % other == 0 for other in range(side + 1, int(side * math.sqrt(self.ratio)) + 1))

        near = sorted(range(2, 2 * count + 12), key=lambda side: (abs(side - count), side))
        return " or ".join([str(side * self.step) for side in near if has_others(side)][:2])


def nearest(height: int, width: int, shapes: Sequence[Side]) -> int:
    """Which of the shapes has the proportions that are nearest to those of an image, by the logarithm of their ratio."""
    own = math.log(height / width)
    return min(range(len(shapes)), key=lambda place: abs(math.log(shapes[place][0] / shapes[place][1]) - own))
