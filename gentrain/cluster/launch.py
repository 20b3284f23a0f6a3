"""Runs a training run where its `cluster:` section says: in this process, or on workers under Ray Train."""

from __future__ import annotations

import os
from contextlib import ExitStack

from gentrain.cluster import session
from gentrain.cluster.attempts import Started, note
from gentrain.cluster.progress import follow
from gentrain.cluster.ray_train import train_with_ray
from gentrain.cluster.stopping import STOP_FILE, StopFile, stop_on_signals
from gentrain.training.lock import cannot_write, hold
from gentrain.training.loop import CALLBACKS, Outcome, train
from gentrain.training.run import RunConfig, refuse_other_settings, save_config
from gentrain.training.watchdog import group_timeout_s
from gentrain.training.world import join, leave


def launch(run: RunConfig) -> Outcome:
    """Trains to the end, or until a signal asks it to stop; either way a checkpoint is published.

    Raises:
        ConfigError, CheckpointError, Diverged: what must be mended first; also when another process trains in the directory, or it
            cannot be written. TrainingFailed: Ray Train gave up.
    """
    run.fit_space()  # what it measures is part of the configuration that is saved
    with ExitStack() as stack:
        if int(os.environ.get("RANK", 0)) == 0:  # of the ranks of torchrun
            stack.enter_context(hold(run.directory))
        refuse_other_settings(run)
        if int(os.environ.get("RANK", 0)) == 0:
            try:
                save_config(run)
                (run.directory / STOP_FILE).unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(run.directory, error) from error
        stack.enter_context(follow(run))
        outcome = _launch_inline(run) if run.cluster.place == "inline" else _launch_ray(run)
        if int(os.environ.get("RANK", 0)) == 0:
            note(run.directory, outcome.value)
        return outcome


def _launch_inline(run: RunConfig) -> Outcome:
    with stop_on_signals() as flag:
        world = join(group_timeout_s(run.training.hang_timeout_s))
        try:
            by_file = StopFile(run.directory)
            return train(run, world, lambda: flag() or by_file(), (*CALLBACKS, Started))
        finally:
            leave()


def _launch_ray(run: RunConfig) -> Outcome:
    session.start()  # before our signal handlers, which it would replace
    try:
        with stop_on_signals() as flag:
            return train_with_ray(run, flag)
    finally:
        (run.directory / STOP_FILE).unlink(missing_ok=True)
