"""What an optimiser is to the rest of gentrain, and what makes those of a library fit into a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from gentrain.config import Component, Fraction, option

Partition = Literal["elementwise", "global_scalar", "per_tensor", "matrix"]


class Optimizer(Component, kind="optimizer"):
    """An optimiser as configured.

    Attributes:
        needs: what a step needs to see of the parameters: `elementwise` (any slice will do), `global_scalar` (one number over all of
            them), `per_tensor` or `matrix` (each whole).
    """

    needs: ClassVar[Partition]
    lr: float

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        raise NotImplementedError

    def state_bytes(self, ndim: int) -> tuple[float, int]:
        """Bytes of the state per element of a parameter with so many dimensions, and beside that per parameter: those of one that steps."""
        with torch.random.fork_rng(devices=[]):
            p = nn.Parameter(torch.ones(16, 4) if ndim > 1 else torch.ones(64))
            optimizer = self.build([p])
            p.grad = torch.full_like(p, 0.1)
            optimizer.step()
        state = [value.untyped_storage() for value in optimizer.state[p].values() if isinstance(value, Tensor)]
        sizes = [storage.nbytes() for storage in {storage.data_ptr(): storage for storage in state}.values()]
        return sum(size for size in sizes if size >= p.numel()) / p.numel(), sum(size for size in sizes if size < p.numel())


@dataclass
class AdamLike(Optimizer):
    """The fields that Adam's relatives share."""

    lr: PositiveFloat = option(1e-3, "peak learning rate")
    beta1: Fraction = option(0.9, "decay of the gradient average", unit="per step")
    beta2: Fraction = option(0.999, "decay of the squared-gradient average", unit="per step")
    eps: PositiveFloat = option(1e-8, "added to the root of the squared-gradient average")
    weight_decay: NonNegativeFloat = option(0.0, "decoupled; multiplied by the learning rate")

    def rule(self) -> dict[str, Any]:
        """As torch names them."""
        return {"lr": self.lr, "betas": (self.beta1, self.beta2), "eps": self.eps, "weight_decay": self.weight_decay}


def decay_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """The parameters, those apart whose attribute `decays` a network has set to False: no weight decay pulls them towards zero.

    Resolved before an engine flattens them: each group gets shards of its own.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for p in parameters:
        groups[getattr(p, "decays", True)].append(p)
    rules: dict[bool, dict[str, Any]] = {True: {}, False: {"weight_decay": 0.0}}
    return [{"params": found, **rules[decays]} for decays, found in groups.items() if found]


class Rule(torch.optim.Optimizer):
    """An update rule that treats each element alike; subclasses implement `update`, which counts its steps in state["step"]."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group)

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Steps the parameter p, in place, along its gradient g."""
        raise NotImplementedError


def counted(library: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A class of pytorch-optimizer whose state a checkpoint holds: the library counts steps in its groups, which none does."""

    class Counted(library):  # type: ignore[misc, valid-type]
        def step(self, closure: Callable[[], float] | None = None) -> None:
            for group in self.param_groups:
                known = [self.state[p]["step"] for p in group["params"] if "step" in self.state.get(p, ())]
                group["step"] = int(known[0]) if known else 0
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    if p in self.state:
                        self.state[p]["step"] = torch.tensor(float(group["step"]))

    return Counted
