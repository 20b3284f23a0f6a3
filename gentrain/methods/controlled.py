"""What methods whose generator is given a control share: the control of a batch, its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gentrain.extractors.base import Extractor
from gentrain.methods.base import Batch, Nets, condition_of
from gentrain.models.base import Condition
from gentrain.models.control import CONTROL
from gentrain.paths.base import Path

BRANCH = r"^control\."  # the parameters of a network that its control added


def known_of(control: Extractor, batch: Batch) -> Condition | None:
    """The batch's condition without the control: what a teacher knows that has never met it."""
    return None if control.labels else condition_of(batch)


def steered(condition: Condition | None, control: Tensor) -> Condition:
    """The condition of a network that also reads the control."""
    return {**(condition or {}), CONTROL: control}


@torch.no_grad()
def control_of(control: Extractor, nets: Nets, batch: Batch) -> Tensor:
    """Of the batch's data: [B, ...], or the class [B]."""
    return batch["label"] if control.labels else control.read(nets.decode(batch["x"]), _networks(control, nets))


@torch.no_grad()
def control_shown(control: Extractor, nets: Nets, path: Path, x0: Tensor) -> Tensor:
    """That samples x0 [B, ...], in the path's coordinates, show."""
    return control.read(nets.decode(path.space.decode(x0)), _networks(control, nets))


def control_loss(control: Extractor, nets: Nets, path: Path, asked: Tensor, x0: Tensor) -> Tensor:
    """-log p(asked | x0) but for a constant, [B] nats, of samples x0 [B, ...] in the path's coordinates; its gradient reaches them."""
    return control.loss(asked, nets.decode(path.space.decode(x0)), _networks(control, nets))


def _networks(control: Extractor, nets: Nets) -> dict[str, Any]:
    return {name: getattr(nets, name) for name in control.networks()}
