"""The launcher's parent: it passes on what the launcher comes to, starts it again when it dies, and neither outlives the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from gentrain.cluster import supervise
from gentrain.cluster.attempts import ATTEMPTS, backoff, last_failure
from gentrain.training.cluster import Cluster

SCRIPT = """
import os, signal, subprocess, sys, tempfile, time
from pathlib import Path
from gentrain.cluster import session
from gentrain.cluster.session import ClusterLost
from gentrain.cluster.stopping import receive
from gentrain.cluster.supervise import supervise
from gentrain.training.run import Cluster
directory = Path(sys.argv[2])
tempfile.tempdir = str(directory)

def body():
    times = len(list(directory.glob("time-*")))
    (directory / f"time-{times}").touch()
    session._directory and Path(session._directory[0], "log").touch()
    print("body", os.getpid(), flush=True)
    if sys.argv[1] == "wait":
        stopped = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: stopped.append(1))
        while not stopped:
            time.sleep(0.05)
        (directory / "stopped").touch()
        return 75
    if sys.argv[1] == "mistake":
        raise KeyError("a mistake")
    if times >= int(sys.argv[3]):
        return 42
    if sys.argv[1] == "lost":
        raise ClusterLost("Ray is gone")
    if sys.argv[1] == "leave":  # as Ray's client does when the head is gone
        subprocess.Popen(["sleep", "300"])
        os._exit(1)
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "early":
    receive()
    os.kill(os.getpid(), signal.SIGTERM)
sys.exit(supervise(body, Cluster(place="ray", max_attempts=3, backoff_s=300 if sys.argv[1] == "patient" else 0.1), directory))
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a supervised body; when the test ends, nothing that it started is left."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    started: list[subprocess.Popen[str]] = []

    def call(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, arguments[0], str(tmp_path), *arguments[1:]]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield call
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    for process in [*left, *started]:
        process.kill()
    for process in started:
        process.communicate()
    assert [child for child in left if child.pid not in {process.pid for process in started}] == []


def _reasons(directory: Path) -> list[str]:
    return [json.loads(line)["reason"] for line in (directory / ATTEMPTS).read_text().splitlines()]


@pytest.mark.parametrize("death, reason", [("kill", "died of SIGKILL"), ("leave", "died with status 1"), ("lost", "Ray is gone")])
def test_a_launcher_that_dies_is_started_again_and_its_outcome_passed_on(start: Start, tmp_path: Path, death: str, reason: str) -> None:
    process = start(death, "2")
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 42, said
    assert printed.count("body") == 3
    assert len(_reasons(tmp_path)) == 2 and all(reason in each for each in _reasons(tmp_path))
    assert last_failure(tmp_path) == _reasons(tmp_path)[-1]
    assert not [each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == ["sleep", "300"]]
    assert len(list(tmp_path.glob("gentrain-ray-*"))) <= 1  # of the last attempt: its session deletes it, and this body has none


def test_it_gives_up_in_the_end_and_keeps_the_logs(start: Start, tmp_path: Path) -> None:
    process = start("kill", "99")
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert printed.count("body") == 3 and "max_attempts" in said
    (logs,) = tmp_path.glob("gentrain-ray-*")
    assert str(logs) in said


def test_a_mistake_in_the_program_is_not_repeated(start: Start, tmp_path: Path) -> None:
    process = start("mistake", "0")
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 1 and printed.count("body") == 1
    assert "KeyError: 'a mistake'" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_launcher(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    process = start("wait")
    assert process.stdout is not None and process.stdout.readline().startswith("body")
    time.sleep(0.3)
    process.send_signal(number)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "stopped").exists()


def test_a_signal_before_there_is_a_launcher_starts_none(start: Start) -> None:
    process = start("early", "0")
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "body" not in printed and "what was published before stays" in said


def test_a_signal_while_the_next_attempt_is_waited_for_ends_the_waiting(start: Start, tmp_path: Path) -> None:
    process = start("patient", "9")
    while not (tmp_path / ATTEMPTS).exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 75


def test_a_launcher_whose_parent_is_killed_stops_as_it_should(start: Start, tmp_path: Path) -> None:
    process = start("wait")
    assert process.stdout is not None
    launcher = int(process.stdout.readline().split()[1])
    time.sleep(0.3)
    process.kill()
    process.wait()
    try:
        psutil.Process(launcher).wait(timeout=20)
    except psutil.NoSuchProcess:  # has ended already
        pass
    except psutil.TimeoutExpired:
        os.kill(launcher, signal.SIGKILL)
        raise
    assert (tmp_path / "stopped").exists()


def test_logs_are_kept_of_what_failed_and_not_of_what_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(supervise.session, "prepare", lambda: None)
    monkeypatch.setattr(supervise.session, "tidy", lambda keep: kept.append(keep))
    for asked, status in ((False, 1), (True, 75)):
        relay = supervise._Relay()
        relay.asked = asked
        assert supervise._attempts(lambda: "died", relay, Cluster(max_attempts=1), tmp_path) == status
    assert kept == [True, False]


def test_waiting_doubles_up_to_five_minutes() -> None:
    assert [backoff(restarts, 5) for restarts in (1, 2, 3, 6, 7, 50)] == [5, 10, 20, 160, 300, 300]
    assert backoff(3, 0) == 0
