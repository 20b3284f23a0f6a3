"""What an optimiser is to the rest of gentrain, and what makes those of a library fit into a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from gentrain.config import Component, option

Decay = Annotated[float, Field(ge=0, lt=1)]  # of an average: at 1 it would never leave its beginning
Partition = Literal["elementwise", "global_scalar", "per_tensor", "matrix"]


class Optimizer(Component, kind="optimizer"):
    """An optimiser as configured.

    Attributes:
        needs: what a step needs to see of the parameters: `elementwise` (any slice will do), `global_scalar` (one number over all of
            them), `per_tensor` or `matrix` (each whole).
        averages: what it has learnt is an average that it makes itself, see `Averaging`: of roles that keep one.
        one_lr: numbers that all parameters share follow the learning rate, so that none can have one of its own.
    """

    needs: ClassVar[Partition]
    averages: ClassVar[bool] = False
    one_lr: ClassVar[bool] = False
    lr: float

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        raise NotImplementedError

    def check(self, parameters: list[nn.Parameter]) -> None:
        """Raises ConfigError where of these parameters it would be another optimiser."""

    def scaled(self, times: float) -> Optimizer:
        """This one for a batch so many times as large. Raises ValueError where that has no rule."""
        raise ValueError(f"there is no rule for {self.registered_name}; take adamw, or leave it out")

    def state_bytes(self, shape: tuple[int, ...]) -> tuple[float, int]:
        """Bytes of the state per element of a parameter of this shape, and beside that per parameter: those of one that steps."""
        with torch.random.fork_rng(devices=[]):
            p = nn.Parameter(torch.ones(16, 4) if len(shape) > 1 else torch.ones(64))
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
    beta1: Decay = option(0.9, "decay of the gradient average", unit="per step")
    beta2: Decay = option(0.999, "decay of the squared-gradient average", unit="per step")
    eps: PositiveFloat = option(1e-8, "added to the root of the squared-gradient average")
    weight_decay: NonNegativeFloat = option(0.0, "decoupled; multiplied by the learning rate")

    def rule(self) -> dict[str, Any]:
        """As torch names them."""
        return {"lr": self.lr, "betas": (self.beta1, self.beta2), "eps": self.eps, "weight_decay": self.weight_decay}


def decay_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """The parameters in groups: those apart whose attribute `decays` a network has set to False, which no weight decay pulls to zero, and
    those of each group that the configuration names, whose attribute `group` (see learning.number_groups) is the "number" of theirs.

    Resolved before an engine flattens them: each group gets shards of its own.
    """
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault((getattr(p, "group", 0), not getattr(p, "decays", True)), []).append(p)
    return [
        {"params": found, "number": number, **({"weight_decay": 0.0} if kept else {})} for (number, kept), found in sorted(groups.items())
    ]


def by_shape(parameters: Iterable[nn.Parameter], matrices: dict[str, Any], rest: dict[str, Any]) -> list[dict[str, Any]]:
    """`decay_groups`, in each of them matrices, and whatever has more dimensions, apart from vectors and scalars, with settings."""
    groups = []
    for group in decay_groups(parameters):
        for whole, own in ((True, matrices), (False, rest)):
            found = [p for p in group["params"] if (p.ndim >= 2) == whole]
            groups += [{**own, **group, "params": found}] if found else []
    return groups


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


class Averaging(torch.optim.Optimizer):
    """An optimiser that takes its gradients at one point and calls another what it has learnt."""

    def average(self, p: Tensor) -> Tensor:
        """What it has learnt of a parameter, or a shard, that it has stepped."""
        raise NotImplementedError


def counted(library: type[torch.optim.Optimizer], *sums: str) -> type[torch.optim.Optimizer]:
    """A class of pytorch-optimizer whose state a checkpoint holds: the library counts steps, and sums, in its groups, which none does.

    Args:
        sums: of what else than "step".
    """

    class Counted(library):  # type: ignore[misc, valid-type]
        def step(self, closure: Callable[[], float] | None = None) -> None:
            for group in self.param_groups:
                known: dict[str, Any] = next((self.state[p] for p in group["params"] if "step" in self.state.get(p, ())), {})
                group["step"] = int(known.get("step", 0))
                group.update({key: float(known.get(key, self.defaults[key])) for key in sums})
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    if p in self.state:
                        self.state[p].update({key: torch.tensor(group[key], dtype=torch.float64) for key in ("step", *sums)})

    return Counted
