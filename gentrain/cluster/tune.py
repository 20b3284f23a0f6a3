"""Sweeps on Ray Tune, which places the trials and stops the poor ones early (asynchronous successive halving, ASHA).

A trial is an ordinary run that trains in an actor from one comparison to the next. Each time it publishes a checkpoint, then Tune decides.
What was decided is in the sweep's own record, which is text; Tune's own files, which only pickle can read, are thrown away.
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
from gentrain.cluster.launch import Milestone, launch
from gentrain.cluster.progress import last_record
from gentrain.cluster.ray_train import check_room
from gentrain.cluster.session import ClusterLost
from gentrain.cluster.stopping import STOP_FILE, StopFlag, stop_on_signals
from gentrain.cluster.sweeps import Journal, LoadedSweep, read_record
from gentrain.config import ConfigError, Document, to_dict
from gentrain.training.checkpoint import CheckpointError
from gentrain.training.lock import hold
from gentrain.training.loop import Diverged, Outcome
from gentrain.training.run import METRICS, parse_run

log = logging.getLogger(__name__)


def run_sweep(sweep: LoadedSweep) -> Journal:
    """Trains the trials that have not come to an end, until a signal asks to stop; then what runs publishes a checkpoint.

    Raises:
        ConfigError, CheckpointError: what must be mended first. ClusterLost: Ray is gone.
    """
    with hold(sweep.directory):
        journal = Journal(sweep)
        if journal.unfinished():
            session.start()  # before our signal handlers, which it would replace
            check_room(sweep.trials[0].run)
            with stop_on_signals() as stop:
                _tune(sweep, journal, stop)
        return journal


def _tune(sweep: LoadedSweep, journal: Journal, stop: StopFlag) -> None:
    """Runs Tune to its end in a thread, so that it leaves the signal handlers alone."""
    failures: list[Exception] = []
    watch = _Watch(journal)
    thread = threading.Thread(target=lambda: failures.extend(_fit(sweep, journal, watch, stop)), name="ray-tune", daemon=True)
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

    def __init__(self, journal: Journal):
        self.journal, self.failures = journal, list[Exception]()

    def started(self, name: str) -> None:
        self.journal.note(name, "running")

    def told(self, name: str, result: Mapping[str, Any]) -> None:
        """`done` is set where Tune stops the trial, too."""
        told = result["told"]
        if told in _MEND:
            self.failures.append(_MEND[told](result["error"]))
        elif told == "diverged":
            self.journal.note(name, "diverged", error=result["error"])
        elif told != "interrupted":
            status = "finished" if told == "finished" else "stopped early" if result["done"] else "running"
            self.journal.note(name, status, (result["samples"], result["value"]))  # type: ignore[arg-type]

    def died(self, name: str, error: str) -> None:
        self.journal.note(name, "failed", error=error)


_MEND = {error.__name__: error for error in (ConfigError, CheckpointError)}


def _fit(sweep: LoadedSweep, journal: Journal, watch: _Watch, stop: StopFlag) -> list[Exception]:
    """Runs Tune to its end; what went wrong is returned, since a thread cannot raise into its parent."""
    run = sweep.trials[0].run
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # a trial writes its own metrics
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one tells of Tune's own files, whatever `verbose` says
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # of the same files; why a trial died is in the record
    os.environ["TUNE_FORCE_TRIAL_CLEANUP_S"] = str(int(run.cluster.grace_s))
    from ray import tune
    from ray.exceptions import RayError

    resources = {"cpu": float(run.cluster.cpus_per_worker), "gpu": run.cluster.gpus_per_worker}
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
            tune.with_resources(_trainable(sweep, resources), resources),
            param_space={"trial": tune.grid_search(trials)},
            tune_config=tune.TuneConfig(
                scheduler=_scheduler(sweep, journal),
                max_concurrent_trials=sweep.settings.concurrent,
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
            return [ClusterLost(f"Ray lost the sweep {sweep.directory}: {error}")]
        except Exception as error:  # a thread cannot raise into its parent
            return [error]
    return []


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


def _trainable(sweep: LoadedSweep, resources: Mapping[str, float]) -> Any:
    """What Tune runs as an actor for each trial."""
    from ray.tune import Trainable

    settings = sweep.settings

    class Trial(Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            _prepare(int(resources["cpu"]), bool(resources["gpu"]))

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True  # nothing of one trial is left in the process when the next one begins there

        def step(self) -> dict[str, Any]:
            trial = self.config["trial"]
            os.chdir(trial["working_directory"])  # relative paths mean what they mean to the command; Tune changes it for each trial
            return advance(json.loads(trial["run"]), Path(trial["sweep"]), trial["name"], settings.metric, settings.rungs)

    return Trial


def _prepare(threads: int, accelerated: bool) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if not accelerated:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves all of them visible to an actor that asked for none
    import torch

    torch.set_num_threads(threads)


def advance(values: dict[str, Any], sweep: Path, name: str, metric: str, rungs: Callable[[int], list[int]]) -> dict[str, Any]:
    """Trains a trial to its next comparison, or to its end. What it returns is what Tune is told.

    Args:
        values: the trial's configuration. sweep, name: where its record is, which says how far it has been compared.
        rungs: samples of the run -> where it is compared.
    """
    run = parse_run(Document(values, f"trial {name}"))
    compared = [samples for samples, _ in read_record(sweep)["trials"][name]["rungs"]]
    until = next((rung for rung in rungs(run.training.samples) if rung > max(compared, default=0)), None)
    milestone = Milestone(until or math.inf, metric)
    try:
        outcome = launch(run, milestone)
    except Diverged as error:
        return {"told": "diverged", "error": str(error), "done": True}
    except tuple(_MEND.values()) as error:
        return {"told": type(error).__name__, "error": str(error), "done": True}
    if outcome is Outcome.STOPPED and not milestone.reached:
        return {"told": "interrupted", "done": True}
    value = (last_record(run.directory / METRICS) or {}).get(metric)
    if value is None or not math.isfinite(value):
        return {"told": "diverged", "error": f"{metric} is {value}", "done": True}
    over = outcome is Outcome.FINISHED
    return {"told": "finished" if over else "compared", "samples": milestone.samples, "value": value, "done": over}
