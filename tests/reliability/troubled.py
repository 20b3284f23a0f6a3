"""The method with three roles, whose loss on some samples is another one: not a number, or far too large."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AllowInfNan

from gentrain.config import option, register
from gentrain.methods.base import Batch, Clock, Loss, Nets, Update
from gentrain.noise import Noise
from gentrain.training.world import World
from tests.distributed.cases import Job, train_all
from tests.reliability.cases import ThreeRoles, three_roles


@register("troubled")
@dataclass
class Troubled(ThreeRoles):
    """The loss of `role` is multiplied by `factor`, and `added` to it, on batches that hold a sample in [start, end)."""

    role: str = option("student", "whose loss")
    start: int = option(0, "first sample")
    end: int = option(0, "after the last")
    factor: Annotated[float, AllowInfNan()] = option(1.0, "of the loss, and so of its gradient")
    added: Annotated[float, AllowInfNan()] = option(0.0, "to the loss: what leaves its gradient as it is")
    seen: str = option("", "file for the positions of the samples that each rank sees")

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("fake_score", self._fake_score)
        yield Update("student", self._student)

    def _fake_score(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        if self.seen:
            with Path(self.seen).open("a") as file:
                file.write(json.dumps(batch["index"].tolist()) + "\n")
        return self._troubled("fake_score", self.fake_score_loss(nets, batch, noise), batch)

    def _student(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        return self._troubled("student", self.student_loss(nets, batch, noise), batch)

    def _troubled(self, role: str, loss: Loss, batch: Batch) -> Loss:
        struck = role == self.role and bool(((self.start <= batch["index"]) & (batch["index"] < self.end)).any())
        return Loss(loss.value * self.factor + self.added) if struck else loss


def troubled(output: Path, engine: dict[str, Any] | str, guard: dict[str, Any] | None = None, **method: Any) -> dict[str, Any]:
    """40 steps of 12 samples with a checkpoint every 8 steps."""
    settings = three_roles(output, engine) | {"method": {"name": "troubled", **method}}
    settings["training"] |= {"samples": 480, "checkpoint_every": 96, "keep_last": 99, "spike_guard": guard}
    return settings


def train_troubled(world: World, jobs: list[Job]) -> list[tuple[str, str]]:
    """`train_all` of this module: ranks that are told to run it have the method registered."""
    return train_all(world, jobs)
