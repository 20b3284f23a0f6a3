"""Training workers under Ray Train: what each of them runs, how it is restarted, and how it is asked to stop."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from gentrain.cluster.attempts import Started, backoff, last_failure, note, short, stacks_of
from gentrain.cluster.exporter import Exporter, failures
from gentrain.cluster.milestone import Milestone
from gentrain.cluster.network import Network
from gentrain.cluster.rewards import RewardFleet as RewardFleet  # gives the reward `fleet` its actors, here and in workers
from gentrain.cluster.session import ClusterLost
from gentrain.cluster.stopping import STOP_FILE, STOPPED, StopFile, StopFlag, interruptible
from gentrain.cluster.workers import introductions
from gentrain.config import ConfigError
from gentrain.training.checkpoint import CheckpointError
from gentrain.training.cluster import Cluster
from gentrain.training.loop import CALLBACKS, Diverged, Outcome, train
from gentrain.training.run import RunConfig, open_run
from gentrain.training.watchdog import group_timeout_s, hang
from gentrain.training.world import join, leave

log = logging.getLogger(__name__)

# Would fail in the same way again: reported at once instead of being retried by Ray Train.
_FINAL = {error.__name__: error for error in (ConfigError, CheckpointError, Diverged)}
_PREEMPTED = "preempted"
_LATE_S = 60


class TrainingFailed(RuntimeError):
    """Workers died more often than the configuration allows, or Ray could not place them."""


def train_with_ray(run: RunConfig, stop: StopFlag, milestone: Milestone) -> Outcome:
    """Trains on workers until the end, the milestone, or until `stop` is set. The session has been started.

    A preempted node ends an attempt; the next one does without it.

    Raises:
        ConfigError, CheckpointError, Diverged: what must be mended first. TrainingFailed: Ray Train gave up. ClusterLost: Ray is gone.
    """
    with interruptible():
        check_room(run)
    preemptions = 0
    while True:
        result = _attempt(run, stop, milestone)
        if isinstance(result, Exception):
            raise result
        if result != _PREEMPTED:
            return Outcome(result)
        if stop():
            return Outcome.STOPPED
        preemptions += 1
        limit = run.cluster.max_preemptions
        if limit is not None and preemptions > limit:
            raise TrainingFailed(f"nodes of {run.output} were preempted {preemptions} times; cluster.max_preemptions is {limit}")


def _attempt(run: RunConfig, stop: StopFlag, milestone: Milestone) -> str | Exception:
    """One controller of Ray Train, from its start to its end, or to `grace_s` after a request to stop."""
    result: list[str | Exception] = []

    def fit() -> None:
        try:
            result.append(_fit(run, milestone))
        except Exception as error:  # a thread cannot raise into its parent
            result.append(error)

    # In a thread, so that Ray Train leaves the signal handlers alone: its own would abort the run without a checkpoint.
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    asked: float | None = None
    while thread.is_alive():
        thread.join(0.2)
        if stop() and asked is None:
            asked = time.monotonic()
            (run.directory / STOP_FILE).touch()
        if asked is not None and time.monotonic() - asked > run.cluster.grace_s:
            reason = f"no checkpoint within cluster.grace_s = {run.cluster.grace_s:g} s of the signal; the newest one stays"
            note(run.directory, "abandoned", reason=reason)
            log.warning(reason)
            sys.stderr.flush()
            os._exit(STOPPED)  # the thread cannot be ended, and Ray would end us when it next speaks
    return result[0]


def check_room(run: RunConfig) -> None:
    """Ray Train waits without end for cores and accelerators that the cluster does not have. Nodes of a head that came back may be late."""
    cluster = run.cluster
    deadline, told = time.monotonic() + (_LATE_S if os.environ.get("RAY_ADDRESS") else 0), False
    gpus = f" and {cluster.gpus_per_worker:g} GPU" if cluster.gpus_per_worker else ""
    while cluster.fewest > (there := workers_with_room(cluster)):
        short = f"{cluster.fewest} workers of {cluster.cpus_per_worker} CPU{gpus} do not fit on this cluster, which has room for {there}"
        if time.monotonic() >= deadline:
            raise ConfigError(f"{short}; lower cluster.workers, cpus_per_worker or gpus_per_worker", key="cluster.workers")
        if not told:
            log.warning("%s; nodes that join within %d s are waited for", short, _LATE_S)
        told = True
        time.sleep(1)


def workers_with_room(cluster: Cluster) -> int:
    """How many fit on the nodes that the Ray cluster has now, if nothing else runs there. A worker is on one node."""
    import ray

    needs = {kind: each for kind, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker)) if each}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(kind, 0) / each + 1e-9) for kind, each in needs.items()) for node in nodes)


def _fit(run: RunConfig, milestone: Milestone) -> str:
    """Runs Ray Train's controller to its end. Raises as `train_with_ray` does."""
    from ray.exceptions import RayError
    from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchTrainer

    cluster = run.cluster
    directory = run.directory.resolve()
    resources = {"CPU": float(cluster.cpus_per_worker)} | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})
    threads = {"OMP_NUM_THREADS": str(cluster.cpus_per_worker)}
    passed_on = {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "PYTHONPATH") if name in os.environ}
    if not cluster.gpus_per_worker:
        threads["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves all of them visible to workers that asked for none
    trainer = TorchTrainer(
        _train_on_worker,
        torch_config=introductions(),
        train_loop_config={"directory": str(directory), "working_directory": os.getcwd(), "milestone": milestone},
        scaling_config=ScalingConfig(
            num_workers=cluster.most if cluster.fewest == cluster.most else (cluster.fewest, cluster.most),
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RayRunConfig(
            name="ray",
            storage_path=str(directory),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures,
                max_preemption_failures=-1 if cluster.max_preemptions is None else cluster.max_preemptions,
            ),
            callbacks=[_restarts(directory, cluster.max_failures, cluster.backoff_s)],
            worker_runtime_env={"env_vars": threads | passed_on | cluster.network.environment()},
        ),
    )
    try:
        result = trainer.fit().return_value
    except TrainingFailedError as error:
        raise TrainingFailed(
            f"Ray Train gave up on {run.output} after {cluster.max_failures} restarts: {last_failure(directory) or error}"
        ) from error
    except RayError as error:
        raise ClusterLost(f"Ray lost the controller of {run.output}: {error}") from error
    if "outcome" in result:
        milestone.samples = result["samples"]  # the workers watch a copy
        if result["outcome"] == _PREEMPTED:
            note(directory, "preempted", reason=result["reason"])
        return result["outcome"]
    note(directory, "failed", reason=short(f"{result['error']}: {result['message']}"))
    raise _FINAL[result["error"]](result["message"])


def _restarts(directory: Path, max_failures: int, backoff_s: float) -> Any:
    """Ray Train's callback that writes down why workers died, and waits before they are started again."""
    from ray.train import UserCallback

    class Restarts(UserCallback):
        def __init__(self) -> None:
            self._failures, self._hung = 0, stacks_of(directory)
            self._counter: Any = None  # of the controller's process, which is not this one

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            self._failures += 1
            self._counter = self._counter or failures(directory)
            self._counter.inc()
            reasons = [f"rank {rank}: {short(str(error))}" for rank, error in sorted(worker_exceptions.items())]
            hung = stacks_of(directory) - self._hung
            self._hung |= hung
            reasons = [hang(Path(path)) for path in sorted(hung)] + reasons
            note(directory, "failed", reason="; ".join(reasons))
            if self._failures <= max_failures:
                time.sleep(backoff(self._failures, backoff_s))

    return Restarts()


class _Notice:
    """Whether Ray has announced that a node of this run will be taken away. Asked in a thread: the call waits for all workers."""

    def __init__(self) -> None:
        self.is_set, self.reason = False, "Ray has announced that a node will be taken away"
        threading.Thread(target=self._ask, name="preemption", daemon=True).start()

    def _ask(self) -> None:
        import ray.train

        while not self.is_set:
            if (found := ray.train.get_preemption_info()) is not None:
                nodes = ", ".join(f"node {node} with ranks {ranks}" for node, ranks in sorted(found.preempted_node_to_ranks.items()))
                self.reason = f"Ray has announced that it will be taken away: {nodes}"
                self.is_set = True
            time.sleep(2)


def _train_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each worker of Ray Train runs. It is restarted from the newest published checkpoint when a worker or node dies."""
    import torch

    os.chdir(config["working_directory"])  # relative paths of the configuration mean what they mean to the command
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    directory = Path(config["directory"])
    asked, notice = StopFile(directory), _Notice()
    milestone: Milestone = config["milestone"]
    try:
        run = open_run(directory)
        world = join(group_timeout_s(run.training.hang_timeout_s), run.cluster.network.start_limit_s)
        callbacks = (*CALLBACKS, Started, Network, Exporter, milestone.watch)
        outcome = train(run, world, lambda: asked() or notice.is_set or milestone.reached, callbacks)
        leave()
    except tuple(_FINAL.values()) as error:
        return {"error": type(error).__name__, "message": str(error)}
    preempted = outcome is Outcome.STOPPED and not milestone.reached and not (directory / STOP_FILE).exists()
    return {"outcome": _PREEMPTED if preempted else outcome.value, "samples": milestone.samples, "reason": notice.reason}
