"""The command `gentrain sweep`: killed with all that it has started, asked to stop, and gone on with, to the same end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import gentrain.cluster.tune
from gentrain.cluster.attempts import ATTEMPTS
from gentrain.report import SWEEP
from gentrain.training.run import METRICS
from tests.cluster.test_sweeps import Write, cut_off_and_gone_on, ray_session, write  # noqa: F401  # the last two are fixtures

pytestmark = [pytest.mark.gate, pytest.mark.cluster, pytest.mark.timeout(1500)]

assert gentrain.cluster.tune  # what the command runs: see results.py
PLUGIN = Path(__file__).parents[1] / "reliability" / "plugin_faults.py"
CONFIG: dict[str, Any] = {
    "method": {"name": "faulty_flow", "step_s": 0.02},  # long enough to be met in the middle
    "plugins": [str(PLUGIN)],
    "data": "rings",
    "model": {"name": "mlp", "width": 16},
    "engine": "torch",
    "training": {"samples": 12_800, "batch_size": 32, "log_every": 1_600, "checkpoint_every": 640},
    "sweep": {
        "metric": "loss/model", "choices": {"optimizer.lr": [1e-2, 1e-3, 1e-5, 1e-6]}, "concurrent": 2, "grace": 1_600, "reduction": 2,
    },
}  # fmt: skip


def _start(folder: Path, workers: int) -> subprocess.Popen[bytes]:
    cluster = {"place": "ray", "workers": workers, "network": {"interface": "lo"}} if workers else {}
    (folder / "toy.yaml").write_text(yaml.safe_dump(CONFIG | {"cluster": cluster}))
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "gentrain.cli", "sweep", "toy.yaml"],
            cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | {"COLUMNS": "200"},
        )  # fmt: skip


def _record(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / "runs" / "toy" / SWEEP).read_text())["trials"]
    return {}


def _until(condition: Callable[[], bool], process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.02)


def _samples(folder: Path, name: str) -> list[int]:
    return [json.loads(line)["samples"] for line in (folder / "runs/toy/trials" / name / METRICS).read_text().splitlines()]


@pytest.mark.usefixtures("ray_session")
def test_a_sweep_that_was_cut_off_goes_on_with_two_workers_per_trial(write: Write) -> None:  # noqa: F811
    cut_off_and_gone_on(write, workers=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sweep_survives_sigkill_and_sigterm(tmp_path: Path, workers: int) -> None:
    process = _start(tmp_path, workers)
    _until(lambda: any(trial["rungs"] for trial in _record(tmp_path).values()), process, tmp_path)
    everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(everything, 60)
    before = _record(tmp_path)

    process = _start(tmp_path, workers)
    compared = sum(len(trial["rungs"]) for trial in before.values())
    _until(lambda: sum(len(trial["rungs"]) for trial in _record(tmp_path).values()) > compared, process, tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 75, (tmp_path / "log").read_text()
    stopped = _record(tmp_path)
    assert "running" not in {trial["status"] for trial in stopped.values()}
    assert "a checkpoint is published. Go on with: gentrain sweep toy.yaml" in (tmp_path / "log").read_text()

    assert _start(tmp_path, workers).wait(900) == 0, (tmp_path / "log").read_text()
    after = _record(tmp_path)
    for name, trial in after.items():
        for earlier in (before, stopped):
            assert trial["rungs"][: len(earlier[name]["rungs"])] == earlier[name]["rungs"]  # nothing is judged twice
        assert _samples(tmp_path, name) == list(range(1_600, trial["rungs"][-1][0] + 1, 1_600))
    assert after["000"]["status"] == "finished"
    assert {trial["status"] for trial in after.values()} <= {"finished", "stopped early"}
    assert "stopped early" in {trial["status"] for trial in after.values()}
    assert after["002"]["status"] == after["003"]["status"] == "stopped early"
    attempts = [json.loads(line) for line in (tmp_path / "runs/toy/trials/000" / ATTEMPTS).read_text().splitlines()]
    assert [line["samples"] for line in attempts if line["event"] == "started"].count(0) == 1  # later ones begin from checkpoints
    assert {line["ranks"] for line in attempts if line["event"] == "started"} == {max(workers, 1)}
    assert "report.html" in (tmp_path / "log").read_text() and (tmp_path / "runs/toy/report.html").is_file()
