"""Sweeps on Ray Tune, which places the trials and stops the poor ones early (asynchronous successive halving, ASHA).

A trial is an ordinary run that an actor trains from one comparison to the next, by itself or on workers of Ray Train. Each time it
publishes a checkpoint, then Tune decides. What was decided is in the sweep's own record, which is text; Tune's own files, which
only pickle can read, are thrown away.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gentrain.cluster import session
from gentrain.cluster.launch import launch
from gentrain.cluster.milestone import Milestone
from gentrain.cluster.ray_train import TrainingFailed, check_room, workers_with_room
from gentrain.cluster.session import ClusterLost
from gentrain.cluster.stopping import STOP_FILE, StopFlag, stop_on_signals
from gentrain.cluster.sweeps import Journal, LoadedSweep, Status, Sweep, read_record
from gentrain.config import ConfigError, Document, to_dict
from gentrain.training.checkpoint import CheckpointError
from gentrain.training.cluster import Cluster
from gentrain.training.lock import hold
from gentrain.training.loop import Diverged, Outcome
from gentrain.training.run import parse_run

log = logging.getLogger(__name__)

_RECORD_S = 60.0  # that another process may take to write the record down
_LAUNCHER_BYTES = 512 << 20  # of an actor that only holds workers together


def run_sweep(sweep: LoadedSweep) -> Journal:
    """Trains the trials that have not come to an end, until a signal asks to stop; then what runs publishes a checkpoint.

    Raises:
        ConfigError, CheckpointError: what must be mended first. ClusterLost: Ray is gone.
    """
    with hold(sweep.directory):
        journal = Journal(sweep)
        journal.pause()
        if journal.unfinished():
            session.start()  # before our signal handlers, which it would replace
            check_room(sweep.trials[0].run)
            with stop_on_signals() as stop:
                _tune(sweep, journal, stop)
        return journal


def run_trial(sweep: LoadedSweep, number: int) -> Status:
    """Trains one trial, without Tune, for a job array of them: at each comparison it meets what the others have come to by then.

    Any number of processes may do so at the same time, each with a trial of its own; the record is held only while it is written.

    Raises:
        ConfigError, CheckpointError: what must be mended first; also while `run_sweep` holds the record. ClusterLost: Ray is gone.
    """
    trial = sweep.trials[number]
    told: dict[str, Any] = {"told": "begun"}
    while True:
        with hold(sweep.directory, wait_s=_RECORD_S):
            journal = Journal(sweep)
            watch = _Watch(journal, StopFlag())
            if "value" in told and sweep.settings.grace is not None:
                known = SimpleNamespace(trial_id=trial.name)
                decision = _scheduler(sweep, journal).on_trial_result(None, known, told)
                told["done"] = told["done"] or decision == "STOP"  # ray.tune's TrialScheduler.STOP
            if told["told"] != "begun":
                watch.told(trial.name, told)
            if told["told"] == "interrupted":
                journal.note(trial.name, "waiting")
            if watch.failures:
                raise watch.failures[0]
            if told.get("done") or trial not in journal.unfinished():
                return journal.of(trial.name)["status"]
            watch.started(trial.name)
        told = advance(to_dict(trial.run), sweep.directory, trial.name, sweep.settings)


def _tune(sweep: LoadedSweep, journal: Journal, stop: StopFlag) -> None:
    """Runs Tune to its end in a thread, so that it leaves the signal handlers alone."""
    failures: list[Exception] = []
    watch = _Watch(journal, stop)

    def fit() -> None:
        try:
            _fit(sweep, journal, watch, stop)
        except Exception as error:  # a thread cannot raise into its parent
            failures.append(error)

    thread = threading.Thread(target=fit, name="ray-tune", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        if stop():
            for trial in journal.unfinished():
                if trial.run.directory.exists():
                    (trial.run.directory / STOP_FILE).touch()
    journal.pause()
    for failure in (*watch.failures, *failures):
        raise failure


class _Watch:
    """Writes down what Tune tells of the trials, and keeps what must be mended before any trial can go on."""

    def __init__(self, journal: Journal, stop: StopFlag):
        self.journal, self._stop, self.failures = journal, stop, list[Exception]()

    def started(self, name: str) -> None:
        self.journal.note(name, "running")

    def told(self, name: str, result: Mapping[str, Any]) -> None:
        """`done` is set where Tune stops the trial, too."""
        told = result["told"]
        if told in _MEND:
            self.failures.append(_MEND[told](result["error"]))
        elif told in ("diverged", "failed"):
            self.journal.note(name, told, error=result["error"])
        elif told != "interrupted":
            status = "finished" if told == "finished" else "stopped early" if result["done"] else "running"
            self.journal.note(name, status, (result["samples"], result["value"]))  # type: ignore[arg-type]

    def died(self, name: str, error: str) -> None:
        if self._stop():  # cut off before it could publish a checkpoint: it goes on from an earlier one
            return
        self.journal.note(name, "failed", error=error)


_MEND = {error.__name__: error for error in (ConfigError, CheckpointError)}


def _fit(sweep: LoadedSweep, journal: Journal, watch: _Watch, stop: StopFlag) -> None:
    """Runs Tune to its end. Raises ClusterLost, and what Tune raises."""
    run = sweep.trials[0].run
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # a trial writes its own metrics
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one tells of Tune's own files, whatever `verbose` says
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # of the same files; why a trial died is in the record
    os.environ["TUNE_FORCE_TRIAL_CLEANUP_S"] = str(int(run.cluster.grace_s))
    from ray import tune
    from ray.exceptions import RayError

    resources = _resources(run.cluster)
    trials = [
        {
            "name": trial.name,
            "sweep": str(sweep.directory.resolve()),
            "working_directory": os.getcwd(),
            "run": json.dumps(to_dict(trial.run)),
        }
        for trial in journal.unfinished()
    ]
    with tempfile.TemporaryDirectory(prefix="gentrain-tune-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(_trainable(sweep), resources),
            param_space={"trial": tune.grid_search(trials)},
            tune_config=tune.TuneConfig(
                scheduler=_scheduler(sweep, journal),
                max_concurrent_trials=_at_a_time(sweep.settings.concurrent, run.cluster),
                reuse_actors=True,  # starting one and importing torch takes longer than a short trial
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=folder,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a trial writes its own checkpoints
                failure_config=tune.FailureConfig(max_failures=run.cluster.max_failures),
                callbacks=[_callback(watch)],
                stop=_stopper(lambda: stop() or bool(watch.failures)),
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except RayError as error:
            raise ClusterLost(f"Ray lost the sweep {sweep.directory}: {error}") from error


def _resources(cluster: Cluster) -> dict[str, float]:
    """Of a trial's actor. Ray Train asks for those of workers: all at once, or none, so that no two trials wait for each other."""
    if cluster.place == "ray":
        return {"memory": _LAUNCHER_BYTES}
    return {"cpu": float(cluster.cpus_per_worker), "gpu": cluster.gpus_per_worker}


def _at_a_time(concurrent: int | None, cluster: Cluster) -> int | None:
    """Trials. Tune knows what is left for actors that train; what workers of Ray Train take, it does not."""
    if cluster.place == "inline":
        return concurrent
    room = max(1, workers_with_room(cluster) // cluster.most)
    return min(room, concurrent or room)


def _name(trial: Any) -> str:
    return trial.config["trial"]["name"]


def _scheduler(sweep: LoadedSweep, journal: Journal) -> Any:
    """ASHA, which knows what was compared before."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    settings = sweep.settings
    if settings.grace is None:
        return FIFOScheduler()

    class Asha(ASHAScheduler):
        def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
            """Ray's own would note the last value of a trial that was resumed at a lower rung, too, where it is better than any there."""
            self.on_trial_remove(tune_controller, trial)

    longest = max(trial.run.training.samples for trial in sweep.trials)
    scheduler = Asha(
        time_attr="samples",
        metric="value",
        mode="max" if settings.best_is == "highest" else "min",
        max_t=longest,
        grace_period=min(settings.grace, longest),
        reduction_factor=settings.reduction,
    )
    for name, trial in journal.record["trials"].items():
        known = SimpleNamespace(trial_id=name)
        scheduler.on_trial_add(None, known)
        for samples, value in trial["rungs"]:
            scheduler.on_trial_result(None, known, {"samples": samples, "value": value})
    return scheduler


def _callback(watch: _Watch) -> Any:
    from ray.tune import Callback

    class Tell(Callback):
        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            watch.started(_name(trial))

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
            watch.told(_name(trial), result)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            why = str(trial.get_error() or "its process is gone").strip().splitlines()[-1]
            watch.died(_name(trial), f"its process failed {trial.num_failures} times (cluster.max_failures): {why}")

    return Tell()


def _stopper(asked: Callable[[], bool]) -> Any:
    from ray.tune import Stopper

    class Asked(Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return asked()

    return Asked()


# --- in a trial's process ---------------------------------------------------------------------------------------------------


def _trainable(sweep: LoadedSweep) -> Any:
    """What Tune runs as an actor for each trial."""
    from ray.tune import Trainable

    settings, cluster = sweep.settings, sweep.trials[0].run.cluster

    class Trial(Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            _prepare(cluster)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True  # nothing of one trial is left in the process when the next one begins there

        def step(self) -> dict[str, Any]:
            trial = self.config["trial"]
            os.chdir(trial["working_directory"])  # relative paths mean what they mean to the command; Tune changes it for each trial
            return advance(json.loads(trial["run"]), Path(trial["sweep"]), trial["name"], settings)

    return Trial


def _prepare(cluster: Cluster) -> None:
    threads = cluster.cpus_per_worker if cluster.place == "inline" else 1
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if cluster.place == "ray" or not cluster.gpus_per_worker:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves all of them visible to an actor that asked for none
    import torch

    torch.set_num_threads(threads)


def advance(values: dict[str, Any], sweep: Path, name: str, settings: Sweep) -> dict[str, Any]:
    """Trains a trial to its next comparison, or to its end. What it returns is what Tune is told.

    Args:
        values: the trial's configuration. sweep, name: where its record is, which says how far it has been compared.
        settings: of the sweep.
    """
    run = parse_run(Document(values, f"trial {name}"))
    compared = read_record(sweep)["trials"][name]["rungs"]
    reached = max((samples for samples, _ in compared), default=0)
    until = next((rung for rung in settings.rungs(run.training.samples) if rung > reached), None)
    milestone = Milestone(until or math.inf, settings.logged)
    try:
        outcome = launch(run, milestone)
    except Diverged as error:
        return {"told": "diverged", "error": str(error), "done": True}
    except TrainingFailed as error:  # after cluster.max_failures: Tune need not try as often again
        return {"told": "failed", "error": str(error), "done": True}
    except tuple(_MEND.values()) as error:
        return {"told": type(error).__name__, "error": str(error), "done": True}
    if outcome is Outcome.STOPPED and not milestone.reached:
        return {"told": "interrupted", "done": True}
    value = settings.value(run)
    if value is None or not math.isfinite(value):
        return {"told": "diverged", "error": f"{settings.metric} is {value}", "done": True}
    over = outcome is Outcome.FINISHED
    done = over or settings.given_up([*(each for _, each in compared), value])
    return {"told": "finished" if over else "compared", "samples": milestone.samples, "value": value, "done": done}
