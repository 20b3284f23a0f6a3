"""The space in which a path runs: R^D, the mirror image of a convex set, or the set itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gentrain.config import Component, register
from gentrain.data.base import Data
from gentrain.domains.base import Domain
from gentrain.noise import Noise


class Space(Component, kind="space"):
    """The coordinates z of data x, and the law of the path's noise in them.

    Methods noise `encode(x)` with draws of `prior`; samplers begin at such draws and give `decode` of where they come to. So a method knows
    nothing of the set its data live in. Coordinates have the shape of the data.
    """

    @property
    def normal(self) -> bool:
        """Whether the prior is the standard normal law, so that independent draws add up to draws."""
        return True

    @property
    def bounds(self) -> Domain | None:
        """The set that the coordinates of data lie in and that samplers made for it do not leave; None = all of R^D."""
        return None

    def encode(self, x: Tensor) -> Tensor:
        """Data [B, ...] -> coordinates [B, ...], in x's dtype."""
        return x

    def decode(self, z: Tensor) -> Tensor:
        """Coordinates [B, ...] -> data [B, ...], in z's dtype."""
        return z

    def prior(self, noise: Noise, shape: tuple[int, ...]) -> Tensor:
        """Draws [B, ...] of the law that stands for eps in x_t = alpha(t) x_0 + sigma(t) eps, float32."""
        return noise.normal(shape)

    def fit(self, data: Data) -> None:
        """Measures on the training data what the configuration leaves open; it becomes part of the configuration.

        Raises ValueError when the data cannot be read or their shape is not that of the set.
        """

    def check(self, data: Data) -> None:
        """Raises ValueError when training data lie outside of the set, after `fit`."""


@register("free")
@dataclass
class Free(Space):
    """R^D itself, with normal noise."""
