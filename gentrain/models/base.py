"""What a network is to the rest of gentrain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from gentrain.config import Component
from gentrain.data.base import Data
from gentrain.noise import Noise
from gentrain.paths.base import Path

if TYPE_CHECKING:
    from gentrain.models.denoiser import Denoiser, Prediction
    from gentrain.models.tokens import TokenModel

# {"label": [B] int64, -1 = the null class}, or the codec's entries, each [B, ...], with "null": [B] bool, the rows that count as without
# condition. None = null for every row.
Condition = dict


class Codec:
    """What stands between the data and the networks, and never learns: images become latents, prompts become conditions.

    This one leaves data as they are; the condition is the class.

    Attributes:
        shape: of x as networks see it. shapes: those that x may have in training, `shape` first.
        decoded_shape: of what `decode` gives.
        names: what the labels that `condition` takes stand for.
        takes_prompts: `condition` does.
    """

    takes_prompts = False

    def __init__(self, data: Data):
        self.data, self.shape = data, tuple(data.shape)
        self.shapes = [tuple(shape) for shape in data.shapes]
        self.decoded_shape = self.shape
        self.names: Sequence[str] = data.class_names

    def to(self, device: torch.device) -> Codec:
        """Moves what it holds to the device; returns itself."""
        return self

    def encode(self, batch: dict[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        """A batch of the data set as methods see it: x [B, *shape], and what `condition_of` reads."""
        return batch

    def shaped(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `encode` gives for the batch, perhaps with other numbers, where it would take networks to know them."""
        return self.encode(batch, Noise(0, batch["index"]))

    def skeletons(self) -> dict[str, nn.Module]:
        """The networks that it holds, by name, on the meta device."""
        return {}

    def decode(self, x: Tensor) -> Tensor:
        """x [B, *shape] -> data [B, ...], images in [-1, 1]. Gradients flow through."""
        return x

    def condition(self, labels: Tensor, prompts: Sequence[str] | None = None) -> Condition | None:
        """The condition of rows with `labels` [B] int64: places in `names` (-1: none), or in `prompts` where these are given.

        Raises ValueError when the networks take no prompts and some are given.
        """
        if prompts is not None:
            raise ValueError("this run's network takes classes, not prompts; name labels instead")
        return {"label": labels} if len(self.names) else None


class Model(Component, kind="model"):
    """A network as configured. Heavy libraries are imported in `build`, when a run needs them.

    `classifies`: what it builds is a classifier, not a network for denoising. `decoded`: it is given data, or samples as decoded.
    `of_tokens`: it says how likely tokens are, see `TokenModel`. `read_by`: fields that decide how its weights are read, also where the
    shapes would fit: a run whose weights another one takes must have had the same.
    """

    classifies: ClassVar[bool] = False
    decoded: ClassVar[bool] = False
    of_tokens: ClassVar[bool] = False
    read_by: ClassVar[tuple[str, ...]] = ()

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """A network for samples of `shape` ((C, H, W) or (D,)), initialised from torch's global generator.

        The module's `forward(x, t, condition=None)` maps x [B, *shape], t [B] float (the path's `network_time`) and a condition
        to [B, *shape]; a classifier's `forward(x)` gives logits [B, num_classes] and its `features(x)` penultimate features.

        Raises:
            ValueError: the configuration does not fit the shape (the message says what would).
        """
        raise NotImplementedError

    @property
    def awaited(self) -> bool:
        """Whether an earlier stage of the recipe writes what `build` reads, be it there or not."""
        return False

    @property
    def to_come(self) -> bool:
        """Whether an earlier stage of the recipe has still to write what `build` reads."""
        return False

    def law(self) -> tuple[Path, Prediction] | None:
        """The path and prediction that its weights were trained with; None for weights that are random, or `to_come`."""
        return None

    def seen(self, network: Callable[..., Tensor], path: Path, prediction: Prediction) -> Denoiser | TokenModel:
        """The network that `build` gave, or what stands for it, as methods and samplers see it."""
        from gentrain.models.denoiser import Denoiser

        return Denoiser(network, path, prediction)

    def check_shapes(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Raises ValueError unless one network takes samples of each of these shapes, the first of which `build` is given."""
        if len(shapes) > 1:
            raise ValueError(
                f"{self.registered_name} is for samples of one shape; leave out `buckets`, or take unet or a pipeline's network"
            )

    def check_beside(self, other: Model) -> None:
        """Raises ValueError unless networks of both can be roles of one run."""

    def codec(self, data: Data) -> Codec:
        """What stands between the data and the network. Raises ValueError when the data do not fit."""
        return Codec(data)
