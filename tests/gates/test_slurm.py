"""Jobs of SLURM for which its clock or Ray between its nodes is needed. SLURM runs on this machine, which poses as two nodes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gentrain.cluster.launch import launch
from gentrain.cluster.places import State
from gentrain.cluster.slurm import Slurm
from gentrain.config import Document
from gentrain.training.loop import Outcome
from gentrain.training.run import METRICS, parse_run
from tests.cluster.test_slurm import config, events, needs_slurm, submit
from tests.slurm import cluster, until

pytestmark = [needs_slurm, pytest.mark.gate, pytest.mark.cluster, pytest.mark.timeout(1500), pytest.mark.usefixtures("slurm")]

ENVIRONMENT = {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    with cluster():
        yield


def _records(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]


def test_ray_between_two_nodes_trains_what_one_process_trains_through_a_signal_and_a_requeue(tmp_path: Path) -> None:
    """One core on each node, and two workers: one on each."""
    place, directory = Slurm(nodes=2, cpus_per_node=1, restarts=1, interface="lo", environment=ENVIRONMENT), tmp_path / "run"
    handle = submit(place, directory, 64_000, workers=2)
    until(lambda: (directory / METRICS).exists() and len(_records(directory)) > 25, 300, "the job trains")
    subprocess.run(["scancel", "--batch", "--signal=USR1", handle["job"]], check=True)  # as SLURM's own --signal=B:USR1@... does
    lines = list(place.logs(handle, follow=True))
    assert place.status(handle) is State.SUCCEEDED, lines[-20:]
    noted = [event for event in events(directory) if event["event"] != "slow network"]
    assert [event["event"] for event in noted] == ["started", "stopped", "started", "finished"]
    assert (noted[0]["ranks"], noted[2]["ranks"]) == (2, 2) and noted[2]["samples"] > 0 == noted[0]["samples"]
    records = _records(directory)
    assert [record["samples"] for record in records] == list(range(32, 64_032, 32))  # none twice, none left out
    alone = parse_run(Document(config(tmp_path / "alone", 800), "test"))
    assert launch(alone) is Outcome.FINISHED
    assert [record["loss/model"] for record in records[:25]] == pytest.approx(
        [record["loss/model"] for record in _records(alone.directory)], rel=1e-5
    )


def test_the_time_limit_itself_ends_in_a_checkpoint_a_requeue_and_at_last_a_stop(tmp_path: Path) -> None:
    """A limit of two minutes; SLURM looks at its clock now and then, so that its signal may come up to a minute early."""
    place, directory = Slurm(restarts=1, time_limit_min=2, signal_s=30, environment=ENVIRONMENT), tmp_path / "run"
    handle = submit(place, directory, 1_000_000_000)
    lines = list(place.logs(handle, follow=True))
    assert place.status(handle) is State.STOPPED, lines[-20:]
    noted = events(directory)
    assert [event["event"] for event in noted] == ["started", "stopped", "started", "stopped"]
    assert noted[2]["samples"] > 0 == noted[0]["samples"]
    samples = [record["samples"] for record in _records(directory)]
    assert samples == list(range(32, 32 + samples[-1], 32)) and samples[-1] > noted[2]["samples"]
    assert any("the time is up; start 2 of this job goes on" in line for line in lines)
    assert any("cluster.submit.restarts = 1 are used; gentrain resume goes on" in line for line in lines)
