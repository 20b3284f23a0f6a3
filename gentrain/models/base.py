"""What a network is to the rest of gentrain."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from gentrain.config import Component

Condition = dict  # {"label": [B] int64, -1 = the null class}; None = null for every row


class Model(Component, kind="model"):
    """A network as configured. Heavy libraries are imported in `build`, when a run needs them.

    `classifies`: what it builds is a classifier, not a network for denoising.
    """

    classifies: ClassVar[bool] = False

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """A network for samples of `shape` ((C, H, W) or (D,)), initialised from torch's global generator.

        The module's `forward(x, t, condition=None)` maps x [B, *shape], t [B] float (the path's `network_time`) and a condition
        to [B, *shape]; a classifier's `forward(x)` gives logits [B, num_classes] and its `features(x)` penultimate features.

        Raises:
            ValueError: the configuration does not fit the shape (the message says what would).
        """
        raise NotImplementedError
