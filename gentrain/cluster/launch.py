"""Runs a training run where its `cluster:` section says: in this process, or on workers under Ray Train."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from gentrain.cluster import session
from gentrain.cluster.attempts import ATTEMPTS, Started, note, note_silence, noted
from gentrain.cluster.network import Network
from gentrain.cluster.progress import follow
from gentrain.cluster.ray_train import train_with_ray
from gentrain.cluster.stopping import STOP_FILE, StopFile, interruptible, stop_on_signals
from gentrain.config import ConfigError
from gentrain.training.beginning import refuse_wrong_start
from gentrain.training.callbacks import Callback
from gentrain.training.lock import cannot_write, hold
from gentrain.training.loop import CALLBACKS, Outcome, Trainer, train
from gentrain.training.run import METRICS, RunConfig, save_config
from gentrain.training.watchdog import group_timeout_s
from gentrain.training.world import join, leave, placed


class Milestone(Callback):
    """Asks for a stop once so many samples are seen. Raises ConfigError when the lines of metrics lack a key that is needed there."""

    def __init__(self, at: float, metric: str):
        self.samples, self._at, self._metric = 0, at, metric

    @property
    def reached(self) -> bool:
        return self.samples >= self._at

    def watch(self, trainer: Trainer) -> Milestone:
        self.samples = trainer.clock.samples
        return self

    def on_log(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        skipped = not any(key.startswith("loss/") for key in record)  # every step since the last line: nothing was measured
        if self._metric not in record and not skipped:
            raise ConfigError(f"{METRICS} has no {self._metric!r}; name what it has: {', '.join(record)}", key="sweep.metric")

    def after_step(self, trainer: Trainer) -> None:
        self.samples = trainer.clock.samples


def launch(run: RunConfig, milestone: Milestone | None = None) -> Outcome:
    """Trains to the end, or until a signal or the milestone (of a run in this process) asks it to stop; a checkpoint is published.

    Raises:
        ConfigError, CheckpointError, Diverged: what must be mended first; also when another process trains in the directory, or it
            cannot be written. TrainingFailed: Ray Train gave up.
    """
    rank, _ = placed()
    with interruptible():
        run.fit_space()  # what it measures is part of the configuration that is saved
    with ExitStack() as stack:
        if rank == 0:  # of the ranks of torchrun
            stack.enter_context(hold(run.directory))
        refuse_wrong_start(run, (ATTEMPTS,))
        if rank == 0:
            try:
                note_silence(run.directory)
                save_config(run)
                (run.directory / STOP_FILE).unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(run.directory, error) from error
        stack.enter_context(follow(run))
        outcome = _launch_inline(run, milestone, rank) if run.cluster.place == "inline" else _launch_ray(run)
        if rank == 0:
            note(run.directory, outcome.value)
        return outcome


def _launch_inline(run: RunConfig, milestone: Milestone | None, rank: int) -> Outcome:
    def on_hang(reason: str) -> None:
        note(run.directory, "failed", reason=reason)

    with stop_on_signals() as flag, noted(run.directory, rank):
        world = join(group_timeout_s(run.training.hang_timeout_s), run.cluster.network.start_limit_s)
        try:
            by_file = StopFile(run.directory)
            callbacks = (*CALLBACKS, Started, Network)
            if milestone is None:
                return train(run, world, lambda: flag() or by_file(), callbacks, on_hang)
            return train(run, world, lambda: flag() or by_file() or milestone.reached, (*callbacks, milestone.watch), on_hang)
        finally:
            leave()


def _launch_ray(run: RunConfig) -> Outcome:
    session.start()  # before our signal handlers, which it would replace
    try:
        with stop_on_signals() as flag:
            return train_with_ray(run, flag)
    finally:
        (run.directory / STOP_FILE).unlink(missing_ok=True)
