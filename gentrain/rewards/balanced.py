"""Several rewards whose gradients are weighed so that none is led against another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gentrain.config import ConfigError, option, register
from gentrain.rewards.base import Asked, Networks, Reward
from gentrain.rewards.ensemble import Weighted, _Several

By = Literal["upgrad", "mgda", "pcgrad", "aligned_mtl"]


def weighting(by: By, count: int) -> Callable[[Tensor], Tensor]:
    """torchjd's: the Gramian of `count` gradients [K, K] -> their weights [K]; all 1 for upgrad where no two are at odds."""
    from torchjd import aggregation

    if by == "upgrad":
        return aggregation.UPGradWeighting(pref_vector=torch.ones(count))
    kinds = {"mgda": "MGDAWeighting", "pcgrad": "PCGradWeighting", "aligned_mtl": "AlignedMTLWeighting"}
    found: Callable[[Tensor], Tensor] = getattr(aggregation, kinds[by])()
    return found


def gramians(gradients: Tensor) -> Tensor:
    """Inner products of the gradients of each row, over the rows' mean squared norm: [K, B, ...] -> [B, K, K]."""
    flat = gradients.flatten(2).transpose(0, 1).double()
    products = flat @ flat.mT
    return products / products.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-30)


@register("balanced")
@dataclass
class Balanced(_Several):
    """Several rewards, each times its weight, added with factors that their gradients at the image decide (Jacobian descent, torchjd).

    upgrad (arXiv:2406.16232): each gradient is first projected to where it lowers none of the others, so that following their sum
    lowers none. mgda (the least norm), pcgrad, aligned_mtl. The factors are found for each image, from the Gramian of the gradients at the
    image; then the sum has one backward. Rewards that pull one way are added as in `sum` (upgrad).
    """

    key: ClassVar[str] = "rewards.{}.reward"

    rewards: dict[str, Weighted] = option(help="name -> reward and weight; at least two, all with gradients")
    by: By = option("upgrad", "how their gradients are weighed", source="arXiv:2406.16232; 1810.04650; 2001.06782; 2305.19000")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.rewards) < 2:
            raise ConfigError("one reward has nothing to be weighed against; name it itself", key="rewards")
        if blind := [name for name, part in self.parts().items() if not part.differentiable]:
            raise ConfigError("it has no gradient to be weighed; take `sum`", key=f"rewards.{blind[0]}")

    def parts(self) -> dict[str, Reward]:
        return {name: part.reward for name, part in self.rewards.items()}

    def __call__(self, images: Tensor, asked: Asked, networks: Networks) -> Tensor:
        with torch.enable_grad():
            x = images if images.requires_grad else images.detach().requires_grad_()
            scores = self._scores(x, asked, networks)
            scores = scores * scores.new_tensor([part.weight for part in self.rewards.values()])[:, None]
            found = [torch.autograd.grad(each.sum(), x, retain_graph=True, allow_unused=True)[0] for each in scores]
        gradients = torch.stack([torch.zeros_like(x) if each is None else each for each in found])
        if isinstance(gradients, FakeTensor):  # a plan's, of which nobody can say where they lead
            return scores.sum(0)
        weigh = weighting(self.by, len(scores))
        factors = torch.stack([weigh(each.float().cpu()) for each in gramians(gradients)], 1).to(scores)
        total = (factors * scores).sum(0)
        return total if images.requires_grad else total.detach()
