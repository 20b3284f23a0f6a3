"""The journal of a run outlives a line that was cut, and says of each end of an attempt why it came."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gentrain.cluster.attempts import ATTEMPTS, Started, last_failure, note, note_silence
from gentrain.cluster.launch import launch
from gentrain.cluster.milestone import Milestone
from gentrain.cluster.stopping import STOP_FILE
from gentrain.config import Document
from gentrain.training.loop import Outcome, Trainer
from gentrain.training.run import METRICS, parse_run


@pytest.mark.parametrize("cut", ['{"time": "2026', "\xff\x00", "[1, 2]", "{}"])
def test_a_cut_line_hides_no_other(tmp_path: Path, cut: str) -> None:
    note(tmp_path, "started", attempt=1)
    note(tmp_path, "failed", reason="a full disk")
    with (tmp_path / ATTEMPTS).open("a") as file:
        file.write(cut)
    assert last_failure(tmp_path) == "a full disk"
    note(tmp_path, "started", attempt=2)
    lines = (tmp_path / ATTEMPTS).read_text().splitlines()
    assert lines[-2] == cut and json.loads(lines[-1])["attempt"] == 2
    note_silence(tmp_path)
    assert last_failure(tmp_path).startswith("ended without a word")


def test_a_failure_without_a_reason_has_none(tmp_path: Path) -> None:
    (tmp_path / ATTEMPTS).write_text('{"event": "failed"}\n')
    assert last_failure(tmp_path) == ""


def _lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / ATTEMPTS).read_text().splitlines()]


def _started(directory: Path, ranks: int) -> None:
    world, run = SimpleNamespace(is_main=True, size=ranks), SimpleNamespace(directory=directory)
    Started(cast(Trainer, SimpleNamespace(world=world, run=run, attempt="now", clock=SimpleNamespace(samples=32))))


def test_workers_that_ray_train_replaces_are_written_down(tmp_path: Path) -> None:
    """When a cluster grows it ends an attempt of which nobody is told."""
    _started(tmp_path, 1)
    note(tmp_path, "slow network", ranks=[0])
    _started(tmp_path, 2)
    _started(tmp_path, 2)
    note(tmp_path, "failed", reason="rank 1 died")
    _started(tmp_path, 1)
    lines = _lines(tmp_path)
    assert [line["event"] for line in lines if line["event"] != "slow network"] == [
        "started", "replaced", "started", "replaced", "started", "failed", "started",
    ]  # fmt: skip
    reasons = [line["reason"] for line in lines if line["event"] == "replaced"]
    assert reasons[0] == "Ray Train has replaced 1 workers by 2, for which the cluster has room now"
    assert reasons[1] == "Ray Train has replaced 2 workers by 2"


def test_a_start_by_slurm_names_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SLURM_JOB_ID", "7"), ("SLURM_RESTART_COUNT", "1")):
        monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
        monkeypatch.setenv(name, value)
        _started(tmp_path, 1)
        note(tmp_path, "stopped", reason="SIGUSR1 to its launcher")
    first, _, again, _ = _lines(tmp_path)
    assert first["slurm_job"] == again["slurm_job"] == "7" and again["slurm_restarts"] == "1" and "slurm_restarts" not in first


@pytest.mark.parametrize(
    "ask, reason",
    [
        (lambda directory: os.kill(os.getpid(), signal.SIGUSR1), "SIGUSR1 to its launcher"),
        (lambda directory: (directory / STOP_FILE).touch(), "the file .stop, or a signal to another rank"),
        (None, "to be compared at 96 samples"),
    ],
)
def test_a_stop_is_written_down_with_who_asked(tmp_path: Path, ask: Callable[[Path], None] | None, reason: str) -> None:
    values = {
        "method": "flow_matching", "data": "rings", "model": {"name": "mlp", "width": 8, "depth": 1}, "engine": "torch",
        "training": {"samples": 100_000_000 if ask else 320, "batch_size": 32, "log_every": 32}, "output": str(tmp_path / "run"),
    }  # fmt: skip
    run = parse_run(Document(values, "test"))

    def asks() -> None:
        while not (run.directory / METRICS).exists():
            time.sleep(0.02)
        if ask is not None:
            ask(run.directory)

    thread = threading.Thread(target=asks, daemon=True)
    thread.start()
    assert launch(run, Milestone() if ask else Milestone(70, "samples")) is Outcome.STOPPED
    thread.join()
    (_, stopped) = _lines(run.directory)
    assert (stopped["event"], stopped["reason"]) == ("stopped", reason)


def test_whole_lines_follow_each_other(tmp_path: Path) -> None:
    for number in range(3):
        note(tmp_path, "started", attempt=number)
    text = (tmp_path / ATTEMPTS).read_text()
    assert [json.loads(line)["attempt"] for line in text.split("\n")[:-1]] == [0, 1, 2] and text.endswith("}\n")
