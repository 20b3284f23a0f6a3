"""What a reward is to the rest of gentrain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gentrain.config import Component
from gentrain.data.base import Data
from gentrain.data.latents import Latents
from gentrain.models.base import Model

Asked = Mapping[str, Tensor]  # a batch, of which rewards read "label" [B] and "caption" [B] int64, where the data have them
Networks = Mapping[str, Callable[..., Tensor]]  # role -> the frozen network, as a method's `nets` has it


@dataclass(frozen=True)
class Judge:
    """A frozen network that a reward reads. `classifier`: see models.base; `model`: where the configuration names none for the role."""

    classifier: bool = False
    model: Model | None = None


class Reward(Component, kind="reward"):
    """A number for each image; higher is better. Rewards keep no state between calls and draw no random numbers.

    Attributes:
        differentiable: gradients reach the images; others score images that are detached, and methods that follow gradients refuse them.
        range: [lowest, highest] value.
        licence: of what it was made from: code, weights, the data they were trained on.
        needs: what must be there before it can score, in words.
    """

    differentiable: ClassVar[bool] = True
    range: ClassVar[tuple[float, float]]
    licence: ClassVar[str] = "Apache-2.0, a formula of gentrain's own"
    needs: ClassVar[str] = "nothing"

    def networks(self) -> dict[str, Judge]:
        """The frozen roles that it reads, by name; a method that takes a reward adds them to its own (methods.rewarded.with_judges)."""
        return {}

    def check_data(self, data: Data) -> None:
        """Takes from the data set what it must know (classes, captions). Called as the configuration loads.

        Raises ValueError when it cannot judge images of these data.
        """

    def __call__(self, images: Tensor, asked: Asked, networks: Networks) -> Tensor:
        """images [B, C, H, W] in the data's range, [-1, 1], and what each was to show -> [B] float32.

        Rewards of images take values beyond that range as its ends. A row's reward depends on that row alone. Raises ValueError when
        something that it needs is missing.
        """
        raise NotImplementedError


def check_images(data: Data, channels: Sequence[int] = (1, 3)) -> None:
    """Raises ValueError unless the data are images of one of these numbers of channels, or latents, which are decoded to images first."""
    if isinstance(data, Latents):
        return
    if len(data.shape) != 3 or data.shape[0] not in channels:
        kinds = " or ".join(map(str, channels))
        raise ValueError(f"it reads images with {kinds} channels, {data.registered_name} has samples of shape {data.shape}")


def pixels(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1]; values beyond are taken as the ends, where no gradient passes."""
    return (images.clamp(-1, 1) + 1) / 2


class Texts:
    """What the images of a data set were asked to show, in words: its captions, else its classes.

    Args:
        template: in which {} is the caption or the class' name.

    Raises ValueError when the data have neither.
    """

    def __init__(self, data: Data, template: str = "{}"):
        self.key = "caption" if data.captions else "label"
        self.texts = [template.replace("{}", text) for text in data.captions or data.class_names]
        if not self.texts:
            raise ValueError(f"images are to be compared with texts, and {data.registered_name} has neither captions nor classes")

    def __call__(self, asked: Asked) -> tuple[list[str], Tensor]:
        """(the different texts of the batch, [B] int64 which of them each row has). A label of -1 stands for an empty text."""
        places, rows = asked[self.key].unique(return_inverse=True)
        return ["" if place < 0 else self.texts[place] for place in places.tolist()], rows
