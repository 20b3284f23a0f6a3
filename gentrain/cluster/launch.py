"""Runs a training run where its `cluster:` section says: in this process, or on workers under Ray Train."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from gentrain.cluster import session
from gentrain.cluster.progress import follow
from gentrain.cluster.stopping import STOP_FILE, StopFile, stop_on_signals
from gentrain.config import ConfigError
from gentrain.training.checkpoint import CheckpointError
from gentrain.training.loop import Diverged, Outcome, train
from gentrain.training.run import RunConfig, open_run, refuse_other_settings, save_config
from gentrain.training.world import join, leave

# Would fail in the same way again: reported at once instead of being retried by Ray Train.
_FINAL = {error.__name__: error for error in (ConfigError, CheckpointError, Diverged)}


class TrainingFailed(RuntimeError):
    """Workers died more often than cluster.max_failures allows, or Ray could not place them."""


def launch(run: RunConfig) -> Outcome:
    """Trains to the end, or until a signal asks it to stop; either way a checkpoint is published.

    Raises:
        ConfigError, CheckpointError, Diverged: what must be mended first. TrainingFailed: Ray Train gave up.
    """
    refuse_other_settings(run)
    if int(os.environ.get("RANK", 0)) == 0:
        save_config(run)
    (run.directory / STOP_FILE).unlink(missing_ok=True)
    with follow(run):
        return _launch_inline(run) if run.cluster.place == "inline" else _launch_ray(run)


def _launch_inline(run: RunConfig) -> Outcome:
    with stop_on_signals() as flag:
        world = join()
        try:
            by_file = StopFile(run.directory)
            return train(run, world, lambda: flag() or by_file())
        finally:
            leave()


def _launch_ray(run: RunConfig) -> Outcome:
    session.start()
    _check_room(run)
    result: list[Outcome | Exception] = []
    # In a thread, so that Ray Train leaves the signal handlers alone: its own would abort the run without a checkpoint.
    thread = threading.Thread(target=lambda: result.append(_fit(run)), name="ray-train", daemon=True)
    with stop_on_signals() as flag:
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            if flag():
                (run.directory / STOP_FILE).touch()
    (run.directory / STOP_FILE).unlink(missing_ok=True)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def _check_room(run: RunConfig) -> None:
    """Ray Train waits without end for cores and accelerators that the cluster does not have."""
    import ray

    cluster, there = run.cluster, ray.cluster_resources()
    for kind, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker)):
        if cluster.workers * each > there.get(kind, 0):
            raise ConfigError(
                f"{cluster.workers} workers of {each:g} {kind} do not fit on this cluster, which has {there.get(kind, 0):g}; lower "
                f"cluster.workers or cluster.{kind.lower()}s_per_worker",
                key="cluster.workers",
            )


def _fit(run: RunConfig) -> Outcome | Exception:
    """Runs Ray Train's controller to its end; what went wrong is returned, since a thread cannot raise into its parent."""
    from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster = run.cluster
    directory = run.directory.resolve()
    resources = {"CPU": float(cluster.cpus_per_worker)} | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})
    threads = {"OMP_NUM_THREADS": str(cluster.cpus_per_worker)}
    passed_on = {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "PYTHONPATH") if name in os.environ}
    if not cluster.gpus_per_worker:
        threads["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves all of them visible to workers that asked for none
    trainer = TorchTrainer(
        _train_on_worker,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if cluster.gpus_per_worker else "gloo"),  # flags travel between hosts
        train_loop_config={"directory": str(directory), "working_directory": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=cluster.workers, use_gpu=cluster.gpus_per_worker > 0, resources_per_worker=resources),
        run_config=RayRunConfig(
            name="ray",
            storage_path=str(directory),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            worker_runtime_env={"env_vars": threads | passed_on},
        ),
    )
    try:
        result = trainer.fit().return_value
    except TrainingFailedError as error:
        return TrainingFailed(f"Ray Train gave up on {run.output} after {cluster.max_failures} restarts: {error}")
    except Exception as error:  # a thread cannot raise into its parent
        return error
    return Outcome(result["outcome"]) if "outcome" in result else _FINAL[result["error"]](result["message"])


def _train_on_worker(config: dict[str, str]) -> dict[str, str]:
    """What each worker of Ray Train runs. It is restarted from the newest published checkpoint when a worker or node dies."""
    import torch

    os.chdir(config["working_directory"])  # relative paths of the configuration mean what they mean to the command
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    directory = Path(config["directory"])
    try:
        return {"outcome": train(open_run(directory), join(), StopFile(directory)).value}
    except tuple(_FINAL.values()) as error:
        return {"error": type(error).__name__, "message": str(error)}
