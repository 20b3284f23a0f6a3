"""A method whose three roles begin with the same weights, and runs of it with adapters. In a module of its own for spawned ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gentrain.config import register
from gentrain.methods.base import Frozen, Role, Trained
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


def train_adapted(world: World, jobs: list[Job]) -> list[tuple[str, str]]:
    """`train_all`, where importing this module has registered the method."""
    return train_all(world, jobs)


def partial(output: Path, engine: dict[str, Any] | str = "torch", method: dict[str, Any] | str = "duet", **training: Any) -> dict[str, Any]:
    """A run whose roles learn some parameters alone."""
    return values(output, method, engine, **training) | {"trainable": "hidden|output", "model": {"name": "dropout_mlp", "dropout": 0}}
