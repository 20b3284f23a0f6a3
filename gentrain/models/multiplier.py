"""The multiplier of a constraint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from gentrain.config import register
from gentrain.models.base import Condition, Model


@register("multiplier")
@dataclass
class Multiplier(Model):
    """One number above 0, softplus(0.54) = 1 at first, by which a method weighs a constraint and which learns how much that takes."""

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return MultiplierNetwork()


class MultiplierNetwork(nn.Module):
    """forward: x [B, ...] (of no influence) -> [B], all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.tensor([0.5413248546]))
        self.raw.decays = False  # type: ignore[attr-defined]  # see decay_groups: the constraint alone moves it

    def forward(self, x: Tensor, t: Tensor | None = None, condition: Condition | None = None) -> Tensor:
        return softplus(self.raw).expand(len(x))
