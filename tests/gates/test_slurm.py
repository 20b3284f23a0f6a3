"""Jobs of SLURM for which its clock or Ray between its nodes is needed. SLURM runs on this machine, which poses as two nodes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from gentrain import cli
from gentrain.cluster.launch import launch
from gentrain.cluster.places import State
from gentrain.cluster.slurm import Slurm
from gentrain.cluster.submissions import find
from gentrain.config import Document
from gentrain.report import SWEEP, write_report
from gentrain.training.loop import Outcome
from gentrain.training.run import METRICS, parse_run
from tests.cluster.test_slurm import ENVIRONMENT, config, events, needs_slurm, submit
from tests.slurm import cluster, until

pytestmark = [needs_slurm, pytest.mark.gate, pytest.mark.cluster, pytest.mark.timeout(1500), pytest.mark.usefixtures("slurm")]


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    with cluster():
        yield


def _records(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]


def test_ray_between_two_nodes_trains_what_one_process_trains_through_a_signal_and_a_requeue(tmp_path: Path) -> None:
    """One core on each node, and two workers: one on each."""
    place, directory = Slurm(nodes=2, cpus_per_node=1, restarts=1, environment=ENVIRONMENT), tmp_path / "run"
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


def test_the_trials_of_a_sweep_are_tasks_of_an_array_two_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    training = {"samples": 64_000, "batch_size": 32, "log_every": 1_600}
    sweep = {"metric": "loss/model", "choices": {"optimizer.lr": [1e-2, 1e-3, 1e-5, 1e-6]}, "grace": 8_000, "reduction": 2}
    submit = {"name": "slurm", "array": "trials", "at_once": 2, "environment": ENVIRONMENT}
    values = config(Path("runs/toy"), 0, training=training, sweep=sweep, cluster={"submit": submit})
    Path("toy.yaml").write_text(yaml.safe_dump(values))
    assert cli._guarded(lambda **options: cli.app(args=["submit", "toy.yaml"], **options)) == 0
    place, record = find("toy")
    lines = list(place.logs(record["handle"], follow=True))
    assert place.status(record["handle"]) is State.SUCCEEDED, lines[-20:]
    trials = json.loads(Path("runs/toy", SWEEP).read_text())["trials"]
    assert sorted(trials) == ["000", "001", "002", "003"] and trials["000"]["status"] == "finished"
    assert {trial["status"] for trial in trials.values()} <= {"finished", "stopped early"}
    for name, trial in trials.items():
        assert [line["samples"] for line in _records(Path("runs/toy/trials", name))] == list(range(1_600, trial["rungs"][-1][0] + 1, 1_600))
    spans = {name: [event["time"] for event in events(Path("runs/toy/trials", name))] for name in trials}
    assert any(one[0] < other[-1] and other[0] < one[-1] for a, one in spans.items() for b, other in spans.items() if a < b)
    page = write_report(Path("runs/toy")).read_text()
    assert all(name in page for name in trials) and "stopped early" in page
