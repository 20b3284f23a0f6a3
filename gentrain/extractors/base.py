"""What an extractor is to the rest of gentrain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import PositiveFloat
from torch import Tensor

from gentrain.config import Component, option
from gentrain.data.base import Data
from gentrain.data.latents import Latents
from gentrain.models.control import Form
from gentrain.rewards.base import Judge, Networks, check_images


def condition_loss(control: Tensor, extracted: Tensor, deviation: float) -> Tensor:
    """-log p(c | x) but for a constant, |c - h(x)|^2 / (2 deviation^2) summed over all but rows: [B, ...] each -> [B].

    Args:
        control: c, what was asked for.
        extracted: h(x), what the sample shows; its gradient reaches the student.
        deviation: tau, of the noise that c is taken to have, in c's units.
    """
    return (control - extracted).square().flatten(1).sum(1) / (2 * deviation**2)


class Extractor(Component, kind="extractor"):
    """The control c of an image x, and p(c | x). It keeps no state between calls.

    Attributes:
        labels: c is the class of the data's items, so that networks are built without classes and learn them as a control alone.
        error_is: what `error` counts, in words.
    """

    labels: ClassVar[bool] = False
    error_is: ClassVar[str] = "mean over the control of |c - h(x)|"

    def networks(self) -> dict[str, Judge]:
        """The frozen roles that it reads, by name."""
        return {}

    def check_data(self, data: Data) -> None:
        """Takes from the data set what it must know. Called as the configuration loads.

        Raises ValueError when samples of these data have no such control.
        """

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError when samples of `shape`, as decoded, have no such control."""

    def form(self, shape: tuple[int, ...]) -> Form:
        """Of the control of samples of `shape`, (C, H, W) or (D,), as decoded."""
        raise NotImplementedError

    def read(self, x: Tensor, networks: Networks) -> Tensor:
        """The control that samples x [B, ...], as decoded, show: [B, *form.shape], or [B] int64."""
        raise NotImplementedError

    def loss(self, control: Tensor, x: Tensor, networks: Networks) -> Tensor:
        """-log p(c | x), but for a constant, in nats: [B]. Its gradient reaches x."""
        raise NotImplementedError

    def error(self, control: Tensor, x: Tensor, networks: Networks) -> Tensor:
        """How far samples are from the control that they were asked for, for people: [B] float, 0 = just as asked."""
        return (control - self.read(x, networks)).abs().flatten(1).mean(1)


class OfImage(Extractor):
    """That images show."""

    def check_data(self, data: Data) -> None:
        check_images(data)
        for shape in () if isinstance(data, Latents) else data.shapes:  # what latents decode to is known once their decoder is there
            self.check_shape(shape)


@dataclass(kw_only=True)
class Map(OfImage):
    """A differentiable function h of images whose value, in [0, 1], is the control, read as c ~ N(h(x), deviation^2)."""

    deviation: PositiveFloat = option(0.1, "tau of p(c | x) = N(h(x), tau^2): the smaller, the more the control counts")

    def loss(self, control: Tensor, x: Tensor, networks: Networks) -> Tensor:
        return condition_loss(control, self.read(x, networks), self.deviation)
