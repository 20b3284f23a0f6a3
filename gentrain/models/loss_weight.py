"""A learnt weight of a loss, as a function of time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from gentrain.config import register
from gentrain.models.base import Condition, Model
from gentrain.models.inputs import WIDTH, interval_embedding


@register("loss_weight")
@dataclass
class LossWeight(Model):
    """One number for each time: the logarithm of a loss weight (arXiv:2312.02696, section B.2), 0 at first."""

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return LossWeightNetwork()


class LossWeightNetwork(nn.Module):
    """forward: x [B, ...] (of no influence), t [B] in [0, 1000] -> [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(WIDTH, 1, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return self.output(interval_embedding(t / 1000, WIDTH).to(self.output.weight.dtype)).squeeze(1)
