"""Runs a training run where its `cluster:` section says: in this process, or on workers under Ray Train."""

from __future__ import annotations

import logging
from contextlib import ExitStack

from gentrain.cluster import session
from gentrain.cluster.attempts import ATTEMPTS, Started, note, note_silence, noted
from gentrain.cluster.milestone import Milestone
from gentrain.cluster.network import Network
from gentrain.cluster.progress import follow
from gentrain.cluster.ray_train import train_with_ray
from gentrain.cluster.stopping import STOP_FILE, StopFile, StopFlag, interruptible, stop_on_signals
from gentrain.training.beginning import refuse_wrong_start
from gentrain.training.lock import cannot_write, hold
from gentrain.training.loop import CALLBACKS, Outcome, train
from gentrain.training.run import RunConfig, save_config
from gentrain.training.watchdog import group_timeout_s
from gentrain.training.world import join, leave, placed

log = logging.getLogger(__name__)


def launch(run: RunConfig, milestone: Milestone | None = None) -> Outcome:
    """Trains to the end, or until a signal or the milestone asks it to stop; a checkpoint is published.

    Raises:
        ConfigError, CheckpointError, Diverged: what must be mended first; also when another process trains in the directory, or it
            cannot be written. TrainingFailed: Ray Train gave up.
    """
    rank, _ = placed()
    milestone = milestone or Milestone()
    with interruptible():
        run.fit_space()  # what it measures is part of the configuration that is saved
    with ExitStack() as stack:
        if rank == 0:  # of the ranks of torchrun
            stack.enter_context(hold(run.directory))
        changed = refuse_wrong_start(run, (ATTEMPTS,))
        if rank == 0:
            try:
                note_silence(run.directory)
                save_config(run)
                (run.directory / STOP_FILE).unlink(missing_ok=True)
                if changed.settings:
                    log.info("%s", changed)
                    note(run.directory, "changed", samples=changed.samples, settings=changed.settings)
            except OSError as error:
                raise cannot_write(run.directory, error) from error
        stack.enter_context(follow(run))
        outcome, flag = _launch_inline(run, milestone, rank) if run.cluster.place == "inline" else _launch_ray(run, milestone)
        if rank == 0:
            note(run.directory, outcome.value, **({"reason": _asked_by(flag, milestone)} if outcome is Outcome.STOPPED else {}))
        return outcome


def _asked_by(flag: StopFlag, milestone: Milestone) -> str:
    if flag():
        return f"{flag.signal} to its launcher"
    return f"to be compared at {milestone.samples} samples" if milestone.reached else f"the file {STOP_FILE}, or a signal to another rank"


def _launch_inline(run: RunConfig, milestone: Milestone, rank: int) -> tuple[Outcome, StopFlag]:
    def on_hang(reason: str) -> None:
        note(run.directory, "failed", reason=reason)

    with stop_on_signals() as flag, noted(run.directory, rank):
        world = join(group_timeout_s(run.training.hang_timeout_s), run.cluster.network.start_limit_s)
        try:
            by_file = StopFile(run.directory)
            callbacks = (*CALLBACKS, Started, Network, milestone.watch)
            return train(run, world, lambda: flag() or by_file() or milestone.reached, callbacks, on_hang), flag
        finally:
            leave()


def _launch_ray(run: RunConfig, milestone: Milestone) -> tuple[Outcome, StopFlag]:
    session.start()  # before our signal handlers, which it would replace
    try:
        with stop_on_signals() as flag:
            return train_with_ray(run, flag, milestone), flag
    finally:
        (run.directory / STOP_FILE).unlink(missing_ok=True)
