"""The training loop: from a configuration to a published checkpoint, on one rank of any number."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from gentrain.config import ConfigError
from gentrain.data.loader import Loader
from gentrain.methods.base import Batch, Clock, Update
from gentrain.noise import Noise, derive
from gentrain.training import checkpoint as checkpoints
from gentrain.training.callbacks import Callback, MetricsFile, Previews, TensorBoard, due
from gentrain.training.roles import Roles
from gentrain.training.run import CHECKPOINTS, RunConfig
from gentrain.training.world import World

log = logging.getLogger(__name__)


class Outcome(Enum):
    """How `train` ended. STOPPED: a checkpoint is published and calling it again goes on from there."""

    FINISHED = "finished"
    STOPPED = "stopped"


class Diverged(RuntimeError):
    """Too many steps in a row had a gradient that is not finite. The last good checkpoint is the newest one."""


class Trainer:
    """One run on one rank. What callbacks see.

    Attributes:
        run, world, roles: what is trained, where, the networks.
        clock: how far it is. seconds: of training so far, over all attempts.
        skipped: role -> optimiser steps skipped for a gradient that is not finite.
    """

    def __init__(self, run: RunConfig, world: World):
        self.run, self.world = run, world
        portions = world.size * run.training.micro_batches
        if run.training.batch_size % portions:
            raise ConfigError(
                f"{run.training.batch_size} samples cannot be shared by {world.size} ranks x {run.training.micro_batches} micro-batches; "
                f"set a multiple of {portions}",
                key="training.batch_size",
            )
        root = run.directory / CHECKPOINTS
        resume = checkpoints.latest(root)
        state: dict[str, Any] = checkpoints.verify(resume) if resume else {"samples": 0, "seconds": 0.0, "skipped": {}}
        _refuse_other_method(state, run, resume)
        self.roles = Roles(run, world, resume)
        batch = run.training.batch_size
        total = -(-run.training.samples // batch) * batch
        self.clock = Clock(samples=state["samples"], batch_size=batch, total=total)
        self.skipped: dict[str, int] = {role: state["skipped"].get(role, 0) for role in self.roles.engines}
        self._in_a_row = dict.fromkeys(self.roles.engines, 0)
        self._lr: dict[str, float] = {}
        self._published = self.clock.samples if resume else None
        self._sums: dict[str, Tensor] = {}
        self._seconds_before, self._started = float(state["seconds"]), time.monotonic()

    @property
    def seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def fit(self, callbacks: list[Callback], should_stop: Callable[[], bool]) -> Outcome:
        """Trains until the samples are seen or any rank is asked to stop; either way a checkpoint is published."""
        run = self.run
        loader = Loader(
            run.data.split("train"), run.seed, run.training.batch_size, self.world.rank, self.world.size, run.training.micro_batches,
            start=self.clock.samples, workers=run.training.data_workers, max_corrupt=run.training.max_corrupt,
        )  # fmt: skip
        outcome = Outcome.FINISHED
        batches = iter(loader)
        while self.clock.samples < self.clock.total:
            if self.roles.group.any(should_stop()):
                outcome = Outcome.STOPPED
                break
            self._step([{key: value.to(self.world.device) for key, value in batch.items()} for batch in next(batches)])
            if due(self.clock, run.training.log_every):
                record = self._record()
                for callback in callbacks:
                    callback.on_log(self, record)
            for callback in callbacks:
                callback.after_step(self)
            if due(self.clock, run.training.checkpoint_every):
                self.publish()
        if self._published != self.clock.samples:
            self.publish()
        for callback in callbacks:
            callback.on_end(self)
        return outcome

    def _step(self, micro_batches: list[Batch]) -> None:
        # Dropout inside networks draws from torch's own generator: a function of the position, so that resuming repeats it.
        torch.manual_seed(derive(self.run.seed, "torch", self.clock.samples, self.world.rank))
        for index, update in enumerate(self.run.method.updates(self.clock)):
            self._update(index, update, micro_batches)
        self.clock = Clock(self.clock.samples + self.clock.batch_size, self.clock.batch_size, self.clock.total)

    def _update(self, index: int, update: Update, micro_batches: list[Batch]) -> None:
        run, role = self.run, update.role
        engine = self.roles.engines[role]
        passes = [(number, loss, batch) for number, loss in enumerate(update.losses) for batch in micro_batches]
        means: list[dict[str, Tensor]] = []
        with self.roles.stepping(role) as nets:
            for place, (number, compute, batch) in enumerate(passes):
                noise = Noise(_stream(run.seed, index, number), batch["index"], self.world.device)
                loss = compute(nets, batch, noise)
                engine.backward(loss.value / len(micro_batches), last=place == len(passes) - 1)
                means.append({f"loss/{role}": loss.value.detach() * len(update.losses), **loss.logs})  # losses of one update add up
        self._lr[role] = run.optimizer_of(role).lr * run.schedule_of(role).factor(self.clock)
        result = engine.step(self._lr[role])
        self._in_a_row[role] = 0 if result.applied else self._in_a_row[role] + 1
        if not result.applied:
            self.skipped[role] += 1
            log.warning("role %s: the gradient is not finite at sample %d; step skipped on all ranks", role, self.clock.samples)
            if self._in_a_row[role] > run.training.max_skipped:
                raise Diverged(
                    f"role {role!r}: {self._in_a_row[role]} steps in a row had a gradient that is not finite (training.max_skipped is "
                    f"{run.training.max_skipped}); the last good checkpoint is "
                    f"{checkpoints.latest(run.directory / CHECKPOINTS) or 'none: no step was good'}. Lower optimizer.lr or set "
                    "engine.gradient_clipping, then run again"
                )
        else:
            for values in means:
                self._accumulate(values, 1 / len(micro_batches))
            self._accumulate({f"grad_norm/{role}": torch.tensor(result.grad_norm)}, 1.0)
            if engine.ema is not None:
                engine.update_ema(_ema_decay(self.run, self.clock))

    def _accumulate(self, values: dict[str, Tensor], weight: float) -> None:
        """Sums on the device: only logging steps wait for it."""
        for key, value in values.items():
            entry = torch.stack([value.detach().float(), torch.ones_like(value, dtype=torch.float32)]) * weight
            self._sums[key] = self._sums[key] + entry if key in self._sums else entry

    def _record(self) -> dict[str, Any]:
        """Means since the last record over all ranks, of the steps that were not skipped; the learning rates of the last ones."""
        keys = sorted(self._sums)
        means = torch.zeros(0)
        if keys:
            means = self.roles.group.mean(torch.stack([self._sums[key].to(self.world.device) for key in keys]))
        self._sums = {}
        seconds = self.seconds
        record: dict[str, Any] = {"samples": self.clock.samples, "seconds": round(seconds, 3)}
        record |= {key: (pair[0] / pair[1]).item() for key, pair in zip(keys, means.cpu(), strict=True)}
        record |= {f"lr/{role}": lr for role, lr in self._lr.items()}
        record |= {f"skipped/{role}": count for role, count in self.skipped.items()}
        return record

    def publish(self) -> None:
        """Writes a checkpoint of every role that learns. Collective."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, engine in self.roles.engines.items():
            tensors[f"{name}.weights"] = engine.weights()
            tensors[f"{name}.optimizer"] = engine.optimizer_state()
            if engine.ema is not None:
                tensors[f"{name}.ema"] = engine.ema_weights()
        failure = ""
        if self.world.is_main:
            state = {
                "samples": self.clock.samples, "seconds": self.seconds, "skipped": self.skipped,
                "method": self.run.method.registered_name, "roles": sorted(self.roles.engines), "world_size": self.world.size,
            }  # fmt: skip
            try:
                checkpoints.publish(self.run.directory / CHECKPOINTS, self.clock.samples, tensors, state, self.run.training.keep_last)
            except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own way
                failure = str(error)
        if self.roles.group.any(bool(failure)):
            raise OSError(f"no checkpoint could be written under {self.run.directory}: {failure or 'see rank 0'}")
        self._published = self.clock.samples


@cache
def _stream(seed: int, update: int, loss: int) -> int:
    return derive(seed, "update", update, loss)


def _ema_decay(run: RunConfig, clock: Clock) -> float:
    """Per step. After s samples the half-life is min(ema_half_life, ema_warmup * s), so that the start is soon forgotten."""
    half_life = (
        min(run.training.ema_half_life, run.training.ema_warmup * clock.samples) if run.training.ema_warmup else run.training.ema_half_life
    )
    return 0.5 ** (clock.batch_size / max(half_life, 1e-8))


def _refuse_other_method(state: dict[str, Any], run: RunConfig, resume: Path | None) -> None:
    expected = run.method.registered_name
    if resume is not None and state["method"] != expected:
        raise checkpoints.CheckpointError(
            f"{resume} was written by method {state['method']!r}, this run is {expected!r}; choose another output"
        )


def train(
    run: RunConfig,
    world: World,
    should_stop: Callable[[], bool],
    callbacks: Sequence[Callable[[Trainer], Callback]] = (MetricsFile, TensorBoard, Previews),
) -> Outcome:
    """Trains a run on this rank, from its newest checkpoint if it has one.

    Args:
        should_stop: asked before every step; True on one rank stops all of them.
        callbacks: each is made from the trainer before the first step.

    Raises:
        ConfigError: a network or weights do not fit. CheckpointError: the newest checkpoint is damaged. Diverged: see there.
    """
    trainer = Trainer(run, world)
    return trainer.fit([make(trainer) for make in callbacks], should_stop)
