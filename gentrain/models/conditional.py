"""Class labels as networks take them, and diffusers' backbones behind the project's forward(x, t, condition)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from gentrain.models.base import Condition
from gentrain.models.control import Form, TransformerControl, UNetControl, branch_of, control_in
from gentrain.models.inputs import Inputs


def class_index(condition: Condition | None, x: Tensor, num_classes: int) -> Tensor:
    """Row of the label embedding for each of the B samples of x: the label, or `num_classes` (the null class). [B] int64."""
    if condition is None or "label" not in condition or num_classes == 0:
        return torch.full((len(x),), num_classes, dtype=torch.int64, device=x.device)
    label: Tensor = condition["label"]
    return torch.where(label < 0, num_classes, label)


class _WithAdded(nn.Embedding):
    """An embedding of labels, its parameter under the name it had, plus what comes with the labels."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, device="meta")
        self.weight = embedding.weight

    def forward(self, given: tuple[Tensor, Tensor | float]) -> Tensor:  # type: ignore[override]
        labels, added = given
        return super().forward(labels) + added


class _Added(nn.Module):
    def forward(self, given: tuple[None, Tensor | float]) -> Tensor:
        return torch.as_tensor(given[1])


class ConditionalNetwork(nn.Module):
    """A diffusers UNet2DModel or DiTTransformer2DModel as a network of the project.

    Args:
        backbone: the diffusers model, for images [B, C s^2, H / s, W / s].
        num_classes: the backbone's label embedding has one more row, the null class; None = it has no label embedding.
        space_to_depth: s: the backbone sees each s x s block of pixels as channels.
        time_scale: the backbone is given t times this.
    """

    def __init__(self, backbone: nn.Module, num_classes: int | None, space_to_depth: int = 1, time_scale: float = 1.0):
        super().__init__()
        self.backbone, self.num_classes, self.space_to_depth, self.time_scale = backbone, num_classes, space_to_depth, time_scale
        self.inputs: Inputs | None = None
        self.control: UNetControl | TransformerControl | None = None

    def add_inputs(self, names: Sequence[str]) -> None:
        """Has the network read further entries of the condition, see `Inputs`; its output stays as it is until they learn."""
        embeddings = [(m, name) for m in self.backbone.modules() for name, child in m.named_children() if isinstance(child, nn.Embedding)]
        for module, name in embeddings:
            setattr(module, name, _WithAdded(getattr(module, name)))
        if embeddings:
            width = getattr(*embeddings[0]).embedding_dim
        else:  # a UNet without labels: diffusers adds whatever this module makes of them to the embedding of the time
            self.backbone.class_embedding = _Added()
            width = self.backbone.get_submodule("time_embedding.linear_2").out_features
        self.inputs = Inputs(names, width)

    def without_inputs(self) -> nn.Module:
        """The backbone alone, which answers as this network does where nothing is given for its inputs."""
        if self.inputs is None:
            return self.backbone
        backbone, added = copy.deepcopy(self.backbone), self.inputs(torch.zeros(1), None)
        embeddings = [module.weight for module in backbone.modules() if isinstance(module, _WithAdded)]
        with torch.no_grad():
            for weight in embeddings or [backbone.get_parameter("time_embedding.linear_2.bias")]:
                weight += torch.as_tensor(added).reshape(-1)
        return backbone

    def add_control(self, form: Form) -> None:
        """Has the network read a control; its output stays as it is until the branch learns. Raises ValueError when it does not fit."""
        self.control = branch_of(self.backbone, form)

    def begin_control(self) -> None:
        """Has the branch begin as a copy of the network's weights of now."""
        assert self.control is not None
        self.control.begin(self.backbone)

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """x [B, C, H, W], t [B] in [0, 1000], condition {"label": [B] int64, -1 = null} -> [B, C, H, W] in the weights' dtype."""
        labels = None if self.num_classes is None else class_index(condition, x, self.num_classes)
        given = labels if self.inputs is None else (labels, self.inputs(t, condition))
        # t stays as it is: half precision cannot tell neighbouring times apart
        hidden = pixel_unshuffle(x.to(next(self.backbone.parameters()).dtype), self.space_to_depth)
        t, control = t * self.time_scale, control_in(self.control, condition)
        steered = nullcontext() if control is None else self.control.steering(self.backbone, hidden, t, given, control)  # type: ignore[union-attr]
        with steered:
            output = self.backbone(hidden, t, class_labels=given, return_dict=False)[0]
        return pixel_shuffle(output, self.space_to_depth)
