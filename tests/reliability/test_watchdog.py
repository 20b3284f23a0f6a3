"""A rank that makes no progress ends its attempt, and leaves the stacks of all ranks; one that is merely slow does not."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gentrain.cluster.attempts import last_failure
from gentrain.training.run import METRICS
from gentrain.training.watchdog import GATHER_S, SLOW, STACKS, group_timeout_s

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

PLUGIN = Path(__file__).with_name("plugin_faults.py")
COMMAND = [sys.executable, "-c", "from gentrain.cli import main; main()", "train"]

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes that do not outlive the test; their output is their stderr."""
    started: list[subprocess.Popen[str]] = []

    def call(*command: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(list(command), env=os.environ | environment, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield call
    for process in started:
        process.kill()
        process.communicate()


def _configuration(folder: Path, timeout_s: float, **method: Any) -> Path:
    values = {
        "method": {"name": "faulty_flow", "directory": str(folder), **method},
        "plugins": [str(PLUGIN)],
        "data": "rings",
        "model": {"name": "mlp", "width": 8, "depth": 1},
        "engine": "torch",
        "training": {"samples": 320, "batch_size": 16, "log_every": 16, "checkpoint_every": 64, "hang_timeout_s": timeout_s},
        "output": str(folder / "run"),
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_hang_of_one_rank_ends_both_with_the_stacks_of_both(start: Start, tmp_path: Path) -> None:
    configuration = _configuration(tmp_path, 2.0, fault="hang", at=200)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(*COMMAND, str(configuration), RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1], said
    ended = time.time() - (tmp_path / "happened").stat().st_mtime
    assert 2 < ended < 2 + 10  # the limit, an interval of the watching thread, the gathering of stacks
    (attempt,) = (tmp_path / "run" / STACKS).iterdir()
    assert all(str(attempt) in "".join(text.split()) for text in said), said  # a terminal may wrap the line
    stacks = [(attempt / f"rank-{rank}.txt").read_text() for rank in range(2)]
    hung = next(rank for rank in range(2) if "_hang_for_ever" in stacks[rank])
    assert "_wait_for_other_ranks" in stacks[1 - hung]
    assert all(stack.startswith(f"rank {rank} of 2, pid {ranks[rank].pid} on ") for rank, stack in enumerate(stacks))
    assert json.loads((tmp_path / "run" / METRICS).read_text().splitlines()[-1])["samples"] == 192
    assert last_failure(tmp_path / "run") == f"hung (training.hang_timeout_s); stacks: {attempt}"
    again = start(*COMMAND, str(configuration))  # what was published is whole: one process goes on from it
    assert again.wait(timeout=120) == 0, again.communicate()
    assert [json.loads(line)["samples"] for line in (tmp_path / "run" / METRICS).read_text().splitlines()] == list(range(16, 321, 16))


SLOW_BUT_ALIVE = f"""
import sys, time
from pathlib import Path
import torch
from gentrain.training.watchdog import Watchdog
from gentrain.training.world import World
rank, size, timeout_s = (int(sys.argv[3]), 2, float(sys.argv[4])) if len(sys.argv) > 3 else (0, 1, 1.0)
with Watchdog(Path(sys.argv[1]), World(rank, size, torch.device("cpu")), "attempt", timeout_s) as watchdog:
    time.sleep(1.5)  # loading and the first step
    for _ in range(5):
        watchdog.expect()
        time.sleep(0.3)
    watchdog.expect({SLOW})
    time.sleep(1.5)  # a checkpoint
    watchdog.expect()
    print("a step", flush=True)
    time.sleep(float(sys.argv[2]))
    time.sleep(0.2)
"""


def test_a_first_step_and_a_checkpoint_may_be_slow_and_a_paused_process_is_not_hung(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW_BUT_ALIVE, str(tmp_path), "0.5"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "a step\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGSTOP)
        time.sleep(2)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=60) == 0
        assert not (tmp_path / STACKS).exists()
    finally:
        process.kill()
        process.communicate()


def test_the_first_to_find_it_waits_for_the_stacks_of_the_others(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", SLOW_BUT_ALIVE, str(tmp_path), "60"]
    patient = subprocess.Popen([*arguments, "1", "30"], stdout=subprocess.PIPE, text=True)  # looks once a second, and would wait for long
    try:
        assert patient.stdout is not None
        assert patient.stdout.readline() == "a step\n"
        first = subprocess.run([*arguments, "0", "0.4"], stdout=subprocess.DEVNULL, timeout=60, check=False)
        assert (tmp_path / STACKS / "attempt" / "rank-1.txt").exists()
        assert (first.returncode, patient.wait(timeout=20)) == (1, 1)
    finally:
        patient.kill()
        patient.communicate()


def test_stacks_that_cannot_be_written_go_to_stderr(tmp_path: Path) -> None:
    (tmp_path / STACKS).touch()
    command = [sys.executable, "-c", SLOW_BUT_ALIVE, str(tmp_path), "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "most recent call first" in done.stderr


def test_collectives_wait_longer_than_the_watchdog() -> None:
    for timeout_s in (0.1, 600):
        assert group_timeout_s(timeout_s) > SLOW * timeout_s + GATHER_S
