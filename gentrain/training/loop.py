"""The training loop: from a configuration to a published checkpoint, on one rank of any number."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gentrain.config import ConfigError
from gentrain.methods.base import Batch, Clock, Follow, Update
from gentrain.noise import Noise, derive
from gentrain.training.averages import power_decay
from gentrain.training.batches import batches, encoded
from gentrain.training.beginning import claim, note_published
from gentrain.training.callbacks import Callback, HeldOut, MetricsFile, Previews, Trackers, due, sayable
from gentrain.training.checkpoint import STATE, Checkpoint, CheckpointError
from gentrain.training.lock import hold
from gentrain.training.logs import logged
from gentrain.training.profiler import Profiler
from gentrain.training.roles import Roles
from gentrain.training.run import RunConfig
from gentrain.training.saving import Saver, together
from gentrain.training.settings import weight_settings
from gentrain.training.spikes import SpikeWatch
from gentrain.training.watchdog import SLOW, Watchdog
from gentrain.training.world import RankGroup, World

log = logging.getLogger(__name__)

CALLBACKS: tuple[Callable[[Trainer], Callback], ...] = (HeldOut, MetricsFile, Previews, Trackers, Profiler)  # trackers show what was drawn

_LOST = "not_finite/"  # before a metric's key: the share of its values that were not finite


class Outcome(Enum):
    """How `train` ended. STOPPED: a checkpoint is published and calling it again goes on from there."""

    FINISHED = "finished"
    STOPPED = "stopped"


class Diverged(RuntimeError):
    """Too many steps in a row had a gradient that is not finite, or too many rollbacks were of no use. The newest checkpoint is good."""


class Trainer:
    """One run on one rank. What callbacks see.

    Attributes:
        run, world, roles: what is trained, where, the networks.
        clock: how far it is. seconds: of training so far, over all attempts. attempt: the name of this one, on all ranks.
        step_s, waited_s: seconds that the last step took, and that it waited for its data before.
        skipped: role -> optimiser steps skipped for a gradient that is not finite.
    """

    def __init__(self, run: RunConfig, world: World, watchdog: Watchdog):
        self.run, self.world, self._watchdog, self.attempt = run, world, watchdog, watchdog.attempt
        storage = run.storage
        self.saver = Saver(storage, world, run.training, lambda name: note_published(run, name))
        together(world, lambda: claim(run, storage) if world.is_main else None, f"no checkpoint can be written under {storage.where}")
        with self.saver.newest() as resume:
            state: dict[str, Any] = resume.state if resume else {"samples": 0, "seconds": 0.0, "skipped": {}, "metrics": {}}
            if resume is not None:
                _refuse_foreign(state, run, resume)
            self.roles = Roles(run, world, resume)
        batch = run.training.batch_size
        total = -(-run.training.samples // batch) * batch
        self.clock = Clock(samples=state["samples"], batch_size=batch, total=total)
        self.skipped: dict[str, int] = {role: state["skipped"].get(role, 0) for role in self.roles.engines}
        self._in_a_row = dict.fromkeys(self.roles.engines, 0)
        self._lr: dict[str, float] = {}
        self._metrics: dict[str, Any] = state["metrics"]
        self._metric_known = False  # whether there has been one of the name training.keep_best
        self._published = self.clock.samples if resume else None
        self._sums: dict[str, Tensor] = {}
        guard = run.training.spike_guard
        self._spikes = SpikeWatch(guard, run.method.guarded, state.get("spikes", {})) if guard is not None else None
        self._step_sums: dict[str, Tensor] = {}  # of what the guard watches, in one step
        self._seconds_before, self._started = float(state["seconds"]), time.monotonic()
        self.step_s = self.waited_s = 0.0

    @property
    def seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def fit(self, callbacks: list[Callback], should_stop: Callable[[], bool]) -> Outcome:
        """Trains until the samples are seen or any rank is asked to stop; either way a checkpoint is published."""
        run = self.run
        outcome, owed = Outcome.FINISHED, False
        drawn = run.method.pools()
        steps = batches(run, self.world, self.roles.codec, self.roles.digests, self.clock.samples)
        while self.clock.samples < self.clock.total:
            if self.roles.group.any(should_stop()):
                outcome = Outcome.STOPPED
                break
            begun = time.monotonic()
            portions = next(steps)
            self.waited_s = time.monotonic() - begun
            self._step([encoded(batch, run.data, self.roles.codec, run.seed, self.world.device, drawn) for batch in portions])
            self._watchdog.expect(SLOW)  # grids and checkpoints
            self._judge_step()
            self.step_s = time.monotonic() - begun
            if due(self.clock, run.training.log_every):
                record = self._metrics = self._record()
                for callback in callbacks:
                    record |= callback.measure(self)
                for callback in callbacks:
                    callback.on_log(self, record)
                self._refuse_diverged(record)
                self._refuse_unknown_metric(record)
            for callback in callbacks:
                callback.after_step(self)
            self.saver.poll()
            owed = owed or due(self.clock, run.training.checkpoint_every)
            if owed and not self._suspicious:
                owed = False
                if self._published != self.clock.samples:
                    self.publish()
            self._watchdog.expect()
        self._watchdog.expect(SLOW)
        if self._spikes is None or not self._suspicious or self._published is None:
            if self._suspicious:
                log.warning("the newest steps spiked, and there is no checkpoint from before: this one holds what they left")
            if self._published != self.clock.samples:
                self.publish()
        elif outcome is Outcome.FINISHED:  # no step is left that could show the spikes to be noise
            self._roll_back(self._spikes, f"the last {self._spikes.streak} steps")
        self.saver.wait()
        for callback in callbacks:
            callback.on_end(self)
        return outcome

    def _refuse_diverged(self, record: Mapping[str, Any]) -> None:
        why = self.run.method.diverged(record)
        if why is not None:
            self.saver.wait()
            raise Diverged(f"at sample {self.clock.samples}: {why}. The newest checkpoint is {self.run.storage.latest() or 'none'}")

    def _refuse_unknown_metric(self, record: Mapping[str, Any]) -> None:
        """Of training.keep_best, at the first line for which every role has stepped; what there is then is published first."""
        key = self.run.training.keep_best
        if key is None or self._metric_known or any(f"loss/{role}" not in record for role in self.roles.engines):
            return
        self._metric_known = key in record
        if not self._metric_known:
            if self._published != self.clock.samples and not self._suspicious:
                self.publish()
            self.saver.wait()
            raise ConfigError(
                f"this run has no metric {key!r}; name one of these: {', '.join(record)}. Its newest checkpoint has what it has learned",
                key="training.keep_best",
            )

    def _step(self, micro_batches: list[Batch]) -> None:
        # Dropout inside networks draws from torch's own generator: a function of the position, so that resuming repeats it.
        torch.manual_seed(derive(self.run.seed, "torch", self.clock.samples, self.world.rank))
        self.roles.drop(self.clock.samples)
        for index, update in enumerate(self.run.method.updates(self.clock)):
            if isinstance(update, Follow):
                self.roles.engines[update.role].follow(self.roles.engines[update.of], update.decay)
            else:
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
        peak, schedule = run.optimizer_of(role).lr, run.schedule_of(role)
        rates = [peak * schedule.factor(self.clock)]
        rates += [peak * group.lr * (group.schedule or schedule).factor(self.clock) for group in run.role_settings(role).groups]
        self._lr |= {f"{role}/{number}" if number else role: rate for number, rate in enumerate(rates)}
        result = engine.step(*rates)
        self._in_a_row[role] = 0 if result.applied else self._in_a_row[role] + 1
        if not result.applied:
            self.skipped[role] += 1
            log.warning("role %s: the gradient is not finite at sample %d; step skipped on all ranks", role, self.clock.samples)
            if self._in_a_row[role] > run.training.max_skipped:
                self.saver.wait()
                newest = run.storage.latest()
                good = f"{run.storage.where}/{newest}" if newest else "none: no step was good"
                raise Diverged(
                    f"role {role!r}: {self._in_a_row[role]} steps in a row had a gradient that is not finite (training.max_skipped is "
                    f"{run.training.max_skipped}); the last good checkpoint is {good}. "
                    "Lower optimizer.lr or set engine.gradient_clipping, then run again"
                )
        else:
            for values in means:
                self._accumulate(values, 1 / len(micro_batches))
            self._accumulate({f"grad_norm/{role}": torch.tensor(result.grad_norm)}, 1.0)
            if engine.ema is not None:
                engine.update_ema(_ema_decay(self.run, self.clock))
                engine.update_powers([power_decay(length, self.clock.step + 1) for length in run.training.power_ema])

    def _accumulate(self, values: dict[str, Tensor], weight: float) -> None:
        """Sums on the device: only logging steps wait for it. Of each value: it if it is finite, and how often it was and was not."""
        for key, value in values.items():
            finite = value.detach().isfinite()
            entry = torch.stack([torch.where(finite, value.detach().float(), 0.0), finite.float(), 1 - finite.float()]) * weight
            _add(self._sums, key, entry)
            if self._spikes is not None and self._spikes.watches(key):
                _add(self._step_sums, key, entry)

    def _means(self, sums: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        """Of what was finite, over all ranks and over the steps that were not skipped; and the share that was not, where some was not."""
        keys = sorted(sums)
        if not keys:
            return {}, {}
        sums_of_all = self.roles.group.mean(torch.stack([sums[key].to(self.world.device) for key in keys])).cpu()
        means = {key: (each[0] / each[1]).item() for key, each in zip(keys, sums_of_all, strict=True)}
        return means, {key: (each[2] / each[1:].sum()).item() for key, each in zip(keys, sums_of_all, strict=True) if each[2] > 0}

    def _record(self) -> dict[str, Any]:
        """Means since the last record, and the learning rates of the last steps."""
        (means, lost), self._sums = self._means(self._sums), {}
        _warn_of_lost(lost, self.clock.samples)
        seconds = self.seconds
        record: dict[str, Any] = {"samples": self.clock.samples, "seconds": round(seconds, 3)}
        record |= means
        record |= {f"{_LOST}{key}": round(share, 6) for key, share in lost.items()}
        record |= {f"lr/{role}": lr for role, lr in self._lr.items()}
        record |= {f"skipped/{role}": count for role, count in self.skipped.items()}
        if self._spikes is not None:
            record["rollbacks"] = self._spikes.rollbacks
        return record

    @property
    def _suspicious(self) -> bool:
        """Whether the newest steps spiked, so that their weights should not become a checkpoint."""
        return self._spikes is not None and self._spikes.streak > 0

    def _judge_step(self) -> None:
        """Goes back to the newest checkpoint when what the method guards has spiked too often in a row. Collective."""
        if self._spikes is None:
            return
        (values, lost), self._step_sums = self._means(self._step_sums), {}
        values |= dict.fromkeys(lost, math.nan)
        spiking = self._spikes.see(values)
        if spiking:
            self._roll_back(self._spikes, ", ".join(f"{key} = {values[key]:.4g}" for key in spiking))

    def _roll_back(self, spikes: SpikeWatch, what: str) -> None:
        """Weights, averages and optimisers of the newest checkpoint; the clock goes on, so that the data in between are not seen again."""
        self.saver.wait()
        if not spikes.roll_back():
            raise Diverged(
                f"{what} at sample {self.clock.samples}, after {spikes.rollbacks} rollbacks (training.spike_guard.max_rollbacks); lower "
                "optimizer.lr or engine.gradient_clipping, or raise training.spike_guard.threshold if these values are sound"
            )
        with self.saver.newest() as resume:
            log.warning(
                "%s spiked up to sample %d; back to the weights of %s, %s",
                what, self.clock.samples, resume.where if resume else "the start",
                "on with the samples that follow" if self.clock.samples < self.clock.total else "which end the run",
            )  # fmt: skip
            del self.roles  # there may be no room for both
            gc.collect()
            self.roles = Roles(self.run, self.world, resume)
        self._sums = {}
        self._in_a_row = dict.fromkeys(self._in_a_row, 0)
        self.publish()

    def publish(self) -> None:
        """Writes a checkpoint of every role that learns, or begins to (training.async_checkpoints). Collective."""
        metrics = {key: None if f"{_LOST}{key}" in self._metrics else value for key, value in sayable(self._metrics).items()}
        state = {
            "samples": self.clock.samples, "seconds": self.seconds, "skipped": dict(self.skipped), "metrics": metrics,
            "method": self.run.method.registered_name, "roles": sorted(self.roles.engines), "world_size": self.world.size,
            "settings": weight_settings(self.run),
        }  # fmt: skip
        if self.roles.bases:
            state["bases"] = self.roles.bases
        if self._spikes is not None:
            state["spikes"] = self._spikes.state()
        shards = ((f"{name}.{kind}", shard) for name, engine in self.roles.engines.items() for kind, shard in engine.shards())
        self.saver.save(self.clock.samples, shards, state)
        self._published = self.clock.samples


def _add(sums: dict[str, Tensor], key: str, entry: Tensor) -> None:
    sums[key] = sums[key] + entry if key in sums else entry


def _warn_of_lost(lost: Iterable[str], samples: int) -> None:
    """The sums are those of all ranks, so each of them says the same."""
    names = [f"the loss of role {key.removeprefix('loss/')}" if key.startswith("loss/") else key for key in lost]
    if names:
        log.warning(
            "%s: not a finite number in steps up to sample %d, though the gradients were finite, so that the steps were taken; "
            "the means in metrics.jsonl are of the others, and %s... has the share that they leave out",
            ", ".join(names), samples, _LOST,
        )  # fmt: skip


@cache
def _stream(seed: int, update: int, loss: int) -> int:
    return derive(seed, "update", update, loss)


def _ema_decay(run: RunConfig, clock: Clock) -> float:
    """Per step. After s samples the half-life is min(ema_half_life, ema_warmup * s), so that the start is soon forgotten."""
    half_life = (
        min(run.training.ema_half_life, run.training.ema_warmup * clock.samples) if run.training.ema_warmup else run.training.ema_half_life
    )
    return 0.5 ** (clock.batch_size / max(half_life, 1e-8))


def _refuse_foreign(state: dict[str, Any], run: RunConfig, resume: Checkpoint) -> None:
    """Raises CheckpointError for a state that this run cannot have written, be its hash right or not."""
    kinds = {"seconds": int | float, "skipped": dict, "metrics": dict, "method": str, "spikes": dict | None}
    wrong = [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]
    if not wrong:
        sound = {"seconds": 0 <= state["seconds"] < 1e12, "skipped": all(isinstance(count, int) for count in state["skipped"].values())}
        wrong = [key for key in sound if not sound[key]]
    if wrong:
        raise CheckpointError(f"{resume.where}/{STATE} is damaged ({wrong[0]}: {state.get(wrong[0])!r:.100}); {resume.instead}")
    expected = run.method.registered_name
    if state["method"] != expected:
        raise CheckpointError(f"{resume.where} was written by method {state['method']!r}, this run is {expected!r}; choose another output")


def train(
    run: RunConfig,
    world: World,
    should_stop: Callable[[], bool],
    callbacks: Sequence[Callable[[Trainer], Callback]] = CALLBACKS,
    on_hang: Callable[[str], None] = lambda reason: None,
) -> Outcome:
    """Trains a run on this rank, from its newest checkpoint if it has one.

    Args:
        should_stop: asked before every step; True on one rank stops all of them.
        callbacks: each is made from the trainer before the first step.
        on_hang: told why on rank 0, before the watchdog ends the process.

    Raises:
        ConfigError: a network or weights do not fit. CheckpointError: the newest checkpoint is damaged. Diverged: see there.
    """
    portions = world.size * run.training.micro_batches
    if run.training.batch_size % portions:
        raise ConfigError(
            f"{run.training.batch_size} samples cannot be shared by {world.size} ranks x {run.training.micro_batches} micro-batches; "
            f"set a multiple of {portions}",
            key="training.batch_size",
        )
    group = RankGroup(world.size)
    attempt = time.strftime("%Y%m%d-%H%M%S", time.gmtime(group.max(int(time.time()))))
    guard = Watchdog(run.directory, world, attempt, run.training.hang_timeout_s, on_hang)
    with guard as watchdog, _alone(run, world, group), logged(run.directory, world, attempt), _unended():
        trainer = Trainer(run, world, watchdog)
        with closing(trainer.saver):
            return trainer.fit([make(trainer) for make in callbacks], should_stop)


@contextmanager
def _unended() -> Iterator[None]:
    """Within it sys.exit, whatever its status, is an error: the run is not done."""
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"sys.exit({error.code!r}) was called amid the run, by a plugin or a library; the run is not done") from error


@contextmanager
def _alone(run: RunConfig, world: World, group: RankGroup) -> Iterator[None]:
    """Within it no other attempt writes into the run's directory: a rank 0 that outlived its launcher, or was cut off, is waited for."""
    with ExitStack() as stack:
        failure = ""
        if world.is_main:
            try:
                stack.enter_context(hold(run.directory, "writer", wait_s=60))
            except ConfigError as error:
                failure = error.message
        if group.any(bool(failure)):
            raise ConfigError(failure or f"rank 0 may not write into {run.directory}; see its message", key="output")
        yield
