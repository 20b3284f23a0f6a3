"""Multilayer perceptron for vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import silu

from gentrain.config import option, register
from gentrain.models.base import Condition, Model
from gentrain.models.conditional import class_index
from gentrain.models.control import Form, MLPControl, control_in
from gentrain.models.inputs import TIME_SCALE, Inputs


@register("mlp")
@dataclass
class MLP(Model):
    """Residual perceptron; sinusoidal time embedding and label embedding enter every layer."""

    width: PositiveInt = option(128, "hidden units of a layer")
    depth: PositiveInt = option(3, "residual layers")
    time_scale: PositiveFloat = option(1.0, TIME_SCALE)

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Raises ValueError when the samples are not vectors (D,)."""
        if len(shape) != 1:
            raise ValueError(f"mlp is for vectors (D,), got samples of shape {shape}; use unet or dit for images")
        return MLPNetwork(shape[0], num_classes, self.width, self.depth, self.time_scale)


class MLPNetwork(nn.Module):
    """forward: x [B, dim], t [B] in [0, 1000], condition {"label": [B] int64, -1 = null} -> [B, dim] in the weights' dtype."""

    def __init__(self, dim: int, num_classes: int, width: int, depth: int, time_scale: float = 1.0):
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        super().__init__()
        self.num_classes, self.time_scale = num_classes, time_scale
        self.time = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, width)
        self.label_embedding = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.input = nn.Linear(dim, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(depth))
        self.output = nn.Linear(width, dim)
        self.inputs: Inputs | None = None
        self.control: MLPControl | None = None

    def add_inputs(self, names: Sequence[str]) -> None:
        """Has the network read further entries of the condition, see `Inputs`; its output stays as it is until they learn."""
        self.inputs = Inputs(names, self.input.out_features)

    def add_control(self, form: Form) -> None:
        """Has the network read a control; its output stays as it is until the branch learns."""
        self.control = MLPControl(self, form)

    def begin_control(self) -> None:
        """Has the branch begin as a copy of the network's weights of now."""
        assert self.control is not None
        self.control.begin(self)

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        dtype = self.input.weight.dtype
        embedding = self.time_embedding(self.time(t * self.time_scale).to(dtype))
        if self.label_embedding is not None:
            embedding = embedding + self.label_embedding(class_index(condition, x, self.num_classes))
        if self.inputs is not None:
            embedding = embedding + self.inputs(t, condition)
        hidden, control = self.input(x.to(dtype)), control_in(self.control, condition)
        added = [0.0] * len(self.layers) if control is None else self.control(x.to(dtype), embedding, control)  # type: ignore[misc]
        for layer, more in zip(self.layers, added, strict=True):
            hidden = hidden + layer(silu(hidden + embedding)) + more
        return self.output(silu(hidden))
