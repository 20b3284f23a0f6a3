"""Workers under Ray Train, and a fleet of actors: the same numbers as one process, through a death and a request to stop."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from gentrain.cluster import ray_train
from gentrain.cluster.attempts import ATTEMPTS
from gentrain.cluster.generation import generate
from gentrain.cluster.launch import launch
from gentrain.cluster.milestone import Milestone
from gentrain.cluster.session import session
from gentrain.cluster.stopping import STOP_FILE
from gentrain.config import ConfigError, Document
from gentrain.samplers.euler import Euler
from gentrain.training.loop import Outcome
from gentrain.training.run import CHECKPOINTS, METRICS, RunConfig, parse_run
from tests.distributed.cases import newest, state_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

PLUGIN = Path(__file__).with_name("plugin_mortal.py")


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> Iterator[None]:
    """One session for the module; when it ends, no process that it started is left."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with session():
        yield
    started = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not [child for child in alive if "ray" in " ".join(child.cmdline())]


def _run(output: Path, workers: int, **settings: Any) -> RunConfig:
    values = {
        "method": "flow_matching",
        "data": "rings",
        "model": {"name": "mlp", "width": 32},
        "engine": {"name": "deepspeed", "zero_stage": 2},
        "training": {"samples": 640, "batch_size": 32, "log_every": 32, "checkpoint_every": 160},
        "cluster": {"place": "ray" if workers else "inline", "workers": max(1, workers)},
        "output": str(output),
    }
    return parse_run(Document(values | settings, "test"))


def _losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss/model"] for line in (directory / METRICS).read_text().splitlines()]


def _weights(run: RunConfig) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state_of(run.directory).items() if name.startswith("model.ema/")}


def test_two_workers_train_what_one_process_trains_and_a_killed_one_changes_nothing(tmp_path: Path) -> None:
    """The death loses at most what followed the last published checkpoint, and that is done again with the same samples and noise."""
    alone = _run(tmp_path / "alone", 0)
    assert launch(alone) is Outcome.FINISHED
    marker = tmp_path / "died"
    method = {"name": "mortal_flow", "at": 400, "marker": str(marker)}
    training = {"samples": 640, "batch_size": 32, "log_every": 32, "checkpoint_every": 160, "keep_last": 9}
    mortal = _run(tmp_path / "mortal", 2, method=method, plugins=[str(PLUGIN)], training=training)
    assert launch(mortal) is Outcome.FINISHED
    written = {int(path.name): path.stat().st_mtime for path in (mortal.directory / CHECKPOINTS).iterdir() if path.is_dir()}
    assert [samples for samples in sorted(written) if written[samples] < marker.stat().st_mtime] == [160, 320]  # not written again
    assert sorted(written) == [160, 320, 480, 640]
    lines = [json.loads(line) for line in (mortal.directory / ATTEMPTS).read_text().splitlines()]
    assert [line["event"] for line in lines] == ["started", "failed", "started", "finished"]
    assert (lines[0]["ranks"], lines[0]["samples"], lines[2]["samples"]) == (2, 0, 320) and "rank" in lines[1]["reason"]
    assert len(_losses(mortal.directory)) == 20
    assert _losses(mortal.directory) == pytest.approx(_losses(alone.directory), rel=1e-5)
    for name, value in _weights(alone).items():
        torch.testing.assert_close(_weights(mortal)[name], value, rtol=1e-4, atol=1e-6)


def test_a_mistake_that_only_a_worker_can_see_is_reported_once_as_what_it_is(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 2, roles={"model": {"weights": str(tmp_path / "nowhere")}})
    with pytest.raises(ConfigError, match="nowhere is not a run's directory"):
        launch(run)


def test_one_process_can_train_with_deepspeed_more_than_once(tmp_path: Path) -> None:
    """As the stages of a recipe do: groups that DeepSpeed keeps must not outlive the run that they belong to."""
    runs = [_run(tmp_path / name, 0) for name in ("one", "two")]
    assert [launch(run) for run in runs] == [Outcome.FINISHED] * 2
    assert _losses(runs[0].directory) == _losses(runs[1].directory)


def test_more_workers_than_there_are_cores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="do not fit on this cluster"):
        launch(_run(tmp_path / "run", 1000, training={"samples": 1000, "batch_size": 1000}))


def test_a_run_of_other_settings_is_refused_and_keeps_its_configuration(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 0, engine="torch")
    launch(run)
    before = (run.directory / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"another path\.name"):
        launch(_run(run.directory, 0, engine="torch", path="trigflow"))
    assert (run.directory / "config.yaml").read_text() == before


def test_a_request_to_stop_publishes_a_checkpoint_from_which_the_run_goes_on(tmp_path: Path) -> None:
    training = {"samples": 1_000_000, "batch_size": 32, "log_every": 32}
    run = _run(tmp_path / "run", 2, training=training)

    def stop() -> None:
        while not (run.directory / METRICS).exists():
            time.sleep(0.1)
        (run.directory / STOP_FILE).touch()

    thread = threading.Thread(target=stop)
    thread.start()
    assert launch(run) is Outcome.STOPPED
    thread.join()
    stopped = int(newest(run.directory).name)
    assert 0 < stopped < 1_000_000
    rest = _run(run.directory, 2, training=training | {"samples": stopped + 320})
    assert launch(rest) is Outcome.FINISHED
    samples = [json.loads(line)["samples"] for line in (run.directory / METRICS).read_text().splitlines()]
    assert samples == list(range(32, stopped + 321, 32))


def test_workers_stop_together_at_a_milestone_and_go_on(tmp_path: Path) -> None:
    """As a trial of a sweep that has a group of workers does. The last checkpoint is of the milestone, and no sample is lost."""
    run = _run(tmp_path / "run", 2, training={"samples": 640, "batch_size": 32, "log_every": 32})
    milestone = Milestone(200, "loss/model")
    assert launch(run, milestone) is Outcome.STOPPED
    assert milestone.reached and milestone.samples == int(newest(run.directory).name) == 224
    milestone = Milestone(10_000, "loss/modle")
    with pytest.raises(ConfigError, match="has no 'loss/modle'"):
        launch(run, milestone)
    assert len(_losses(run.directory)) in (7, 8) and not milestone.reached


def test_a_node_that_is_taken_away_with_notice_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker is told of it reaches the journal."""
    info = SimpleNamespace(preempted_node_to_ranks={"4f": [1], "1a": [0, 2]})
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: info)
    notice = ray_train._Notice()
    deadline = time.monotonic() + 20
    while not notice.is_set:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    result = SimpleNamespace(return_value={"outcome": "preempted", "samples": 32, "reason": notice.reason})
    monkeypatch.setattr("ray.train.torch.TorchTrainer", lambda *_, **__: SimpleNamespace(fit=lambda: result))
    run = _run(tmp_path, 1)
    assert ray_train._fit(run, Milestone()) == "preempted"
    (line,) = (json.loads(line) for line in (run.directory / ATTEMPTS).read_text().splitlines())
    assert line["event"] == "preempted" and line["reason"].endswith("taken away: node 1a with ranks [0, 2], node 4f with ranks [1]")


def test_a_fleet_draws_what_one_process_draws_whatever_its_size(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 0, engine="torch")
    launch(run)
    labels = torch.arange(250) % 2
    alone = generate(run.directory, Euler(steps=4, guidance=2.0), labels, seed=3)
    assert alone.shape == (250, 2) and alone.isfinite().all()
    assert len(alone.unique(dim=0)) == 250  # none twice
    for actors in (1, 2):
        assert torch.equal(generate(run.directory, Euler(steps=4, guidance=2.0), labels, seed=3, actors=actors), alone)
    assert not torch.equal(generate(run.directory, Euler(steps=4, guidance=2.0), labels, seed=4), alone)
    with pytest.raises(ConfigError, match="nowhere"):
        generate(tmp_path / "nowhere", Euler(), labels, actors=1)


def test_a_fleet_draws_with_a_sampler_of_a_plugin(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 0, engine="torch", plugins=[str(PLUGIN)], sampler={"name": "plugin_euler", "steps": 4})
    launch(run)
    labels = torch.arange(20) % 2
    assert torch.equal(generate(run.directory, run.sampler, labels, actors=1), generate(run.directory, Euler(steps=4), labels))


def test_an_actor_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 0, engine="torch")
    launch(run)
    sampler, labels = Euler(steps=100, guidance=2.0), torch.arange(3_000) % 2
    killed: list[psutil.Process] = []

    def kill() -> None:
        while not killed:
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "Member.call" in child.name() + " ".join(child.cmdline()):
                        child.kill()
                        killed.append(child)
                        break
            time.sleep(0.01)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    drawn = generate(run.directory, sampler, labels, actors=3)
    thread.join(5)
    assert len(killed) == 1
    assert torch.equal(drawn, generate(run.directory, sampler, labels))


def test_training_in_this_process_needs_no_ray(tmp_path: Path) -> None:
    script = (
        "import sys, logging\nfrom gentrain.config import Document\nfrom gentrain.training.run import parse_run\n"
        "from gentrain.cluster.launch import launch\n"
        f"launch(parse_run(Document(dict(method='flow_matching', data='rings', model='mlp', engine='torch', output={str(tmp_path)!r},"
        "training=dict(samples=64, batch_size=32)), 'test')))\nassert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_what_ray_train_cannot_begin_with_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the job's directory is gone."""

    def fail(*_: Any) -> str:
        raise FileNotFoundError("no such directory")

    monkeypatch.setattr(ray_train, "_fit", fail)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        launch(_run(tmp_path / "run", 1))
