"""A method with a student that is averaged, a fake score and a frozen teacher, and how ranks train it and tell what they saw."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gentrain.config import register
from gentrain.methods.base import Batch, Clock, Frozen, Loss, Method, Nets, Role, Trained, Update, condition_of
from gentrain.noise import Noise
from gentrain.training import saving
from gentrain.training.engine import EngineMisuse
from gentrain.training.roles import Roles
from gentrain.training.world import World
from tests.distributed.cases import Job, run_of, train_all, values

SEEN: dict[tuple[str, int], list[float]] = {}  # (role, position of a sample) -> the noise that it met


@register("three_roles")
@dataclass
class ThreeRoles(Method):
    """The fake score follows the student's samples; the student is moved along the difference of the two scores."""

    roles: ClassVar[dict[str, Role]] = {
        "teacher": Frozen(),
        "fake_score": Trained(init="teacher"),
        "student": Trained(init="teacher", ema=True),
    }
    generator: ClassVar[str | None] = "student"

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("fake_score", self.fake_score_loss)
        yield Update("student", self.student_loss)

    def _draw(self, nets: Nets, batch: Batch, noise: Noise, role: str) -> tuple[Tensor, Tensor, Tensor]:
        z, t = noise.normal(tuple(batch["x"].shape)), noise.uniform((len(batch["x"]),), 0.1, 0.9)
        for index, row in zip(batch["index"].tolist(), torch.cat([z, t[:, None]], 1).tolist(), strict=True):
            SEEN[role, index] = row
        x = nets.student.x0(z, torch.ones(len(z)), condition_of(batch))
        return x, nets.teacher.path.perturb(x, noise.normal(tuple(x.shape)), t), t

    def fake_score_loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        with torch.no_grad():
            x, x_t, t = self._draw(nets, batch, noise, "fake_score")
        return Loss((nets.fake_score.x0(x_t, t, condition_of(batch)) - x).square().mean())

    def student_loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        x, x_t, t = self._draw(nets, batch, noise, "student")
        condition = condition_of(batch)
        towards = (nets.fake_score.x0(x_t, t, condition) - nets.teacher.x0(x_t, t, condition)).detach()
        return Loss((x * towards).mean() + (x - batch["x"]).square().mean())


STEPS, HALF = 20, 10
NO_DROPOUT = {"model": {"name": "dropout_mlp", "dropout": 0}}  # which draws by rank


def three_roles(output: Path, engine: dict[str, Any] | str, seed: int = 5) -> dict[str, Any]:
    return values(output, "three_roles", engine, samples=12 * STEPS, micro_batches=1) | NO_DROPOUT | {"seed": seed}


def train_and_tell(world: World, jobs: dict[str, Job]) -> dict[str, tuple[tuple[str, str], dict[tuple[str, int], list[float]]]]:
    """Job -> what it came to on this rank, and what was seen."""
    told = {}
    for name, job in jobs.items():
        SEEN.clear()
        told[name] = (train_all(world, [job])[0], dict(SEEN))
    return told


def train_and_fail(world: World, jobs: dict[str, Job], rank: int) -> dict[str, tuple[tuple[str, str], dict[tuple[str, int], list[float]]]]:
    """`train_and_tell`, where one rank finds the disk full when it writes the checkpoint after the first."""
    write = saving.write_shard

    def full(path: Path, shard: Any) -> None:
        write(path, shard)
        if world.rank == rank and "000000000048" in str(path):
            os.truncate(path, 10)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    saving.write_shard = full
    try:
        return train_and_tell(world, jobs)
    finally:
        saving.write_shard = write


def stale_weights(world: World, engine: dict[str, Any]) -> tuple[str, str]:
    """What an engine says when its masters have changed, and when its live weights were then not made to follow ("": nothing)."""
    run = run_of(values(Path("unused"), "flow_matching", engine))
    built = run.engine.build("model", run.model.build((2,), 3).to(run.engine.live_dtype), run.optimizer, world)
    said = []
    for refresh in (built._refresh, lambda: None):
        built._refresh = refresh  # type: ignore[method-assign]
        for partition in built.partitions:
            partition.data.add_(1)
        try:
            built.refresh()
            said.append("")
        except EngineMisuse as error:
            said.append(str(error))
    return said[0], said[1]


def comes_back(world: World, settings: dict[str, Any]) -> bool:
    """Whether the roles that these settings build hold, to the last bit, the newest checkpoint's masters, averages and optimisers.

    Not its buffers, which bf16 rounds.
    """
    run = run_of(settings)
    newest = run.storage.latest()
    assert newest is not None
    with run.storage.open(newest) as checkpoint:
        shards = [
            (checkpoint.shards(f"{name}.{kind}", world.rank), {key: piece for key, piece in shard.items() if key not in buffers})
            for name, engine in Roles(run, world, checkpoint).engines.items()
            for buffers in [dict(engine.module.named_buffers())]
            for kind, shard in engine.shards()
        ]
        assert len(shards) == 5  # of two roles, and an average
        return all(
            torch.equal(piece.values, saved.read(key, piece.start, len(piece.values), piece.shape))
            for saved, shard in shards
            for key, piece in shard.items()
        )
