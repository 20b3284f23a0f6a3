"""`gentrain train` and `run` as processes: what a signal brings them to, and what becomes of a second one in the same directory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from PIL import Image

from gentrain.training.run import METRICS
from tests.distributed.cases import newest
from tests.reliability.accounts import repeated, seen
from tests.reliability.leftovers import await_none

pytestmark = pytest.mark.timeout(200)

PLUGIN = Path(__file__).with_name("plugin_faults.py")
COMMAND = [sys.executable, "-c", "from gentrain.cli import main; main()"]
STEP_S = 0.1

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the command on a run that takes its time. After the test nothing is left of it: no process and no temporary file."""
    run = {
        "method": {"name": "faulty_flow", "directory": str(tmp_path), "step_s": STEP_S},
        "plugins": [str(PLUGIN)],
        "data": "rings",
        "model": {"name": "mlp", "width": 8, "depth": 1},
        "engine": "torch",
        "training": {"samples": 100_000, "batch_size": 16, "log_every": 16, "checkpoint_every": 160},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    stages = {"model": {"name": "train", "run": {key: run[key] for key in run.keys() - {"output"}}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": stages, "output": str(tmp_path / "recipe")}))
    scratch = Path(tempfile.mkdtemp(prefix="gentrain-test-"))
    started: list[subprocess.Popen[str]] = []

    def call(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        variables = os.environ | {"TMPDIR": str(scratch)} | environment
        process = subprocess.Popen(
            [*COMMAND, *arguments], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
        )
        started.append(process)
        return process

    yield call
    for process in started:
        process.kill()
        process.communicate()
    await_none(scratch, 30)
    not_ours = ["torchinductor_"]  # torch's cache, one per user
    if any(process.returncode == -signal.SIGKILL for process in started):
        not_ours.append("pymp-")  # of Python's multiprocessing, which nobody removes when a parent with data workers is killed
    left = sorted(path.name for path in scratch.iterdir() if not path.name.startswith(tuple(not_ours)))
    shutil.rmtree(scratch)
    assert left == []


def _await_steps(process: subprocess.Popen[str], folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "seen.jsonl").exists() or len(seen(folder)) < steps:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def test_a_signal_publishes_what_there_is_within_a_step(start: Start, tmp_path: Path) -> None:
    """Status 75; the same command goes on without one sample drawn twice or left out."""
    process = start("train", "run.yaml")
    _await_steps(process, tmp_path, 5)
    asked = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    printed, _ = process.communicate(timeout=60)
    passed = time.monotonic() - asked
    assert process.returncode == 75 and "Go on with: gentrain train run.yaml" in printed
    assert passed < STEP_S + 10  # a step, the checkpoint, the end of the process
    stopped = int(newest(tmp_path / "run").name)
    assert stopped == 16 * len(seen(tmp_path))
    rest = start("train", "run.yaml", f"training.samples={stopped + 48}")
    assert rest.wait(timeout=60) == 0
    assert repeated(tmp_path, stopped + 48) == 0
    events = [(line["event"], line.get("samples")) for line in map(json.loads, (tmp_path / "run/attempts.jsonl").read_text().splitlines())]
    assert events == [("started", 0), ("stopped", None), ("started", stopped), ("finished", None)]


def test_a_signal_to_one_rank_publishes_and_stops_both(start: Start, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    ranks = [start("train", "run.yaml", RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    _await_steps(ranks[0], tmp_path, 6)
    ranks[1].send_signal(signal.SIGTERM)
    printed = [process.communicate(timeout=60)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [75, 75], printed
    drawn = [index for step in seen(tmp_path) for index in step]
    assert sorted(drawn) == list(range(len(drawn))) and int(newest(tmp_path / "run").name) == len(drawn)


def test_a_signal_stops_a_recipe_which_goes_on(start: Start, tmp_path: Path) -> None:
    command = ("run", "recipe.yaml", "stages.model.run.training.samples=480")
    process = start(*command)
    _await_steps(process, tmp_path, 4)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "Go on with: gentrain run recipe.yaml" in printed
    assert int(newest(tmp_path / "recipe" / "model").name) == 16 * len(seen(tmp_path)) < 480
    again = start(*command)
    assert again.wait(timeout=60) == 0
    assert repeated(tmp_path, 480) == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_that_read_data_do_not_outlive_a_run(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for index in range(40):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "image.png")
            archive.add(tmp_path / "image.png", f"{index}.png")
    data = f"data={{name: webdataset, shards: {tmp_path / 'a.tar'}, size: 8}}"
    process = start(
        "train", "run.yaml", data, "model={name: unet, channels: [8, 8], attention: [], norm_groups: 4}", "training.data_workers=2"
    )
    _await_steps(process, tmp_path, 2)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.send_signal(number)
    assert process.wait(timeout=60) == (75 if number == signal.SIGTERM else -9)
    assert psutil.wait_procs(workers, timeout=30)[1] == []


@pytest.mark.parametrize("command, file, directory", [("train", "run.yaml", "run"), ("run", "recipe.yaml", "recipe")])
def test_a_second_one_in_the_same_directory_is_refused_and_disturbs_nothing(
    start: Start, tmp_path: Path, command: str, file: str, directory: str
) -> None:
    first = start(command, file)
    _await_steps(first, tmp_path, 2)
    before = {path: path.read_bytes() for path in (tmp_path / directory).rglob("*.yaml")}
    second = start(command, file, *(["training.batch_size=8"] if command == "train" else ["stages.model.run.training.batch_size=8"]))
    printed, _ = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"{directory} is in use by pid {first.pid} of " in printed and "choose another directory" in printed
    assert {path: path.read_bytes() for path in (tmp_path / directory).rglob("*.yaml")} == before
    steps = len(seen(tmp_path))
    _await_steps(first, tmp_path, steps + 2)


def test_a_killed_run_repeats_at_most_what_followed_its_last_checkpoint(start: Start, tmp_path: Path) -> None:
    process = start("train", "run.yaml")
    _await_steps(process, tmp_path, 14)
    process.kill()
    process.wait()
    published = int(newest(tmp_path / "run").name)
    drawn = 1 + max(max(step) for step in seen(tmp_path))
    assert published == 160 and drawn - published <= 160
    again = start("train", "run.yaml", f"training.samples={drawn + 32}")
    assert again.wait(timeout=60) == 0
    assert repeated(tmp_path, drawn + 32) == drawn - published
    events = [json.loads(line) for line in (tmp_path / "run/attempts.jsonl").read_text().splitlines()]
    assert [line["event"] for line in events] == ["started", "failed", "started", "finished"]
    assert events[1]["reason"].startswith("ended without a word")
    assert [json.loads(line)["samples"] for line in (tmp_path / "run" / METRICS).read_text().splitlines()] == list(
        range(16, drawn + 33, 16)
    )


@pytest.mark.parametrize("output, said", [("/proc/nowhere", "cannot be written"), ("run.yaml", "a file of that name is in the way")])
def test_a_directory_that_cannot_be_written_is_said_before_anything_starts(start: Start, tmp_path: Path, output: str, said: str) -> None:
    before = sorted(os.listdir(tmp_path))
    process = start("train", "run.yaml", f"output={output}")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"output: {output} cannot be written" in printed and said in printed and "choose another directory" in printed
    assert sorted(os.listdir(tmp_path)) == before
