"""A method whose three roles begin with the same weights, and runs of it with adapters. In a module of its own for spawned ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial as partial_
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from gentrain.config import register
from gentrain.methods.base import Batch, Clock, Frozen, Loss, Method, Nets, Role, Trained, Update, condition_of
from gentrain.models.base import Condition, Model
from gentrain.noise import Noise
from gentrain.training.world import World
from tests.distributed.cases import Job, Relay, train_all, values

ADAPTER = {"rank": 3, "alpha": 6.0, "targets": ["linear"]}


@register("duet")
@dataclass
class Duet(Relay):
    """Relay, with a critic that begins as the teacher, too: one network below two adapters, and a teacher that is it alone."""

    roles: ClassVar[dict[str, Role]] = {
        "teacher": Frozen(),
        "critic": Trained(init="teacher", denoiser=False),
        "student": Trained(init="teacher", ema=True),
        "reference": Frozen(init="student"),
    }


def adapted(output: Path, engine: dict[str, Any] | str = "torch", method: dict[str, Any] | str = "duet", **training: Any) -> dict[str, Any]:
    return values(output, method, engine, **training) | {"adapter": ADAPTER, "model": {"name": "dropout_mlp", "dropout": 0}}


@register("branched")
@dataclass
class Branched(Method):
    """The second of its losses does not reach all weights that the first one does."""

    roles: ClassVar[dict[str, Role]] = {"model": Trained()}
    generator: ClassVar[str | None] = "model"

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("model", partial_(self.loss, True), partial_(self.loss, False))

    def loss(self, told: bool, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        t = noise.uniform((len(batch["x"]),))
        return Loss((nets.model.raw(batch["x"], t, condition_of(batch) if told else None) - batch["x"]).square().mean())


@register("branches")
@dataclass
class Branches(Model):
    """A network that calls one of its layers only where there is a condition."""

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return _Branches(shape[0])


class _Branches(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.first, self.side, self.last = nn.Linear(dim, 5), nn.Linear(5, 5), nn.Linear(5, dim)

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        hidden = self.first(x.to(self.first.weight.dtype))
        return self.last(hidden if condition is None else self.side(hidden).tanh())


def train_adapted(world: World, jobs: list[Job]) -> list[tuple[str, str]]:
    """`train_all`, where importing this module has registered the method."""
    return train_all(world, jobs)


def partial(output: Path, engine: dict[str, Any] | str = "torch", method: dict[str, Any] | str = "duet", **training: Any) -> dict[str, Any]:
    """A run whose roles learn some parameters alone."""
    return values(output, method, engine, **training) | {"trainable": "hidden|output", "model": {"name": "dropout_mlp", "dropout": 0}}
