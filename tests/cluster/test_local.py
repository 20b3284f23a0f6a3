"""The place `local`, and the record from which what was submitted is found again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gentrain.cluster import submissions
from gentrain.cluster.local import Local
from gentrain.cluster.places import Handle, PlaceError, State, Submission
from gentrain.cluster.submissions import find, read, send, submission_of
from gentrain.config import ConfigError
from tests.reliability.leftovers import sessions_ended

CANARY = "canary-0c52"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Submission]:
    """Submits a stand-in for gentrain, which is a shell script; what it started is gone when the test ends."""
    script = folder / "python"
    script.write_text("#!/bin/sh\necho began; echo $SHOWN\ntrap 'exit 75' TERM\n[ -e quick ] && exit 3\nwhile :; do sleep 0.05; done\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setenv("VAULT_TOKEN", CANARY)
    place = Local(environment={"SHOWN": "shown"}, secrets=["VAULT_TOKEN"])
    with sessions_ended():
        yield submission_of(place, "train", "runs/toy", {"output": str(folder / "runs/toy"), "cluster": {}}, [])


PLACE = Local(environment={"SHOWN": "shown"}, secrets=["VAULT_TOKEN"])


def _await_output(handle: dict[str, Any]) -> None:
    """Before it the system may not know the command of the process that has just been started."""
    deadline = time.monotonic() + 20
    while not Path(handle["log"]).read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _until(handle: dict[str, Any], state: State) -> None:
    deadline = time.monotonic() + 20
    while PLACE.status(handle) is not state:
        assert time.monotonic() < deadline, PLACE.status(handle)
        time.sleep(0.02)


def test_a_local_job_outlives_the_command_and_is_found_by_its_name(stub: Submission, folder: Path) -> None:
    send(PLACE, stub)
    place, record = find("toy")
    handle = record["handle"]
    assert place == PLACE and record["submission"] == stub and place.status(handle) is State.RUNNING
    assert os.getsid(handle["pid"]) != os.getsid(0)  # closing the terminal does not end it
    assert read(folder / "runs/toy")[1] == record == find(str(folder / "runs/toy"))[1]
    lines = place.logs(handle, follow=True)
    assert [next(lines), next(lines)] == ["began", "shown"]
    with pytest.raises(ConfigError, match="toy is running already"):
        send(place, stub)
    place.stop(handle)
    assert list(lines) == []  # it ends with the job
    assert place.status(handle) is State.STOPPED
    place.stop(handle)
    handle = send(place, record["submission"])
    assert handle["log"].endswith("2.log") and find("toy")[1]["handle"] == handle
    next(place.logs(handle, follow=True))
    os.killpg(handle["pid"], signal.SIGTERM)  # as whoever ends a session does: the exit status is written down all the same
    _until(handle, State.STOPPED)


def test_a_job_whose_sender_is_killed_before_the_place_has_answered_is_found(stub: Submission, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(place: Local, submission: Submission, handle: Handle) -> Handle:
        _await_output(submitted(place, submission, handle))
        raise KeyboardInterrupt

    submitted = Local.submit
    monkeypatch.setattr(Local, "submit", killed)
    with pytest.raises(KeyboardInterrupt):
        send(PLACE, stub)
    place, record = find("toy")
    handle = record["handle"]
    assert "pid" not in handle and place.status(handle) is State.RUNNING
    with pytest.raises(ConfigError, match="toy is running already"):
        send(place, stub)
    assert next(place.logs(handle, follow=True)) == "began"
    place.stop(handle)
    _until(handle, State.STOPPED)


def test_what_a_place_refuses_leaves_the_record_as_it_was(stub: Submission, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: Local, submission: Submission, handle: Handle) -> Handle:
        raise PlaceError("the queue is full")

    with monkeypatch.context() as refusing:
        refusing.setattr(Local, "submit", refuse)
        with pytest.raises(PlaceError, match="full"):
            send(PLACE, stub)
        with pytest.raises(ConfigError, match="no run 'toy' has been submitted"):
            find("toy")
    handle = send(PLACE, stub)
    next(PLACE.logs(handle, follow=True))
    PLACE.stop(handle)
    _until(handle, State.STOPPED)
    monkeypatch.setattr(Local, "submit", refuse)
    with pytest.raises(PlaceError, match="full"):
        send(PLACE, stub)
    assert find("toy")[1]["handle"] == handle


def test_a_job_that_was_accepted_though_its_answer_was_lost_is_submitted(stub: Submission, monkeypatch: pytest.MonkeyPatch) -> None:
    def times_out(place: Local, submission: Submission, handle: Handle) -> Handle:
        _await_output(submitted(place, submission, handle))
        raise PlaceError("Socket timed out on send/recv operation")

    submitted = Local.submit
    monkeypatch.setattr(Local, "submit", times_out)
    handle = send(PLACE, stub)
    assert find("toy")[1]["handle"] == handle and PLACE.status(handle) is State.RUNNING
    PLACE.stop(handle)
    _until(handle, State.STOPPED)


def test_a_job_that_ends_while_it_is_asked_to_stop(stub: Submission, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(process: psutil.Process, number: int) -> None:
        raise psutil.NoSuchProcess(process.pid)

    handle = send(PLACE, stub)
    next(PLACE.logs(handle, follow=True))
    monkeypatch.setattr(psutil.Process, "send_signal", gone)
    PLACE.stop(handle)


def test_how_a_local_job_ended(stub: Submission, folder: Path) -> None:
    handle = send(PLACE, stub)
    next(PLACE.logs(handle, follow=True))
    child = psutil.Process(handle["pid"]).children()[0]
    child.kill()
    _until(handle, State.FAILED)
    (folder / "quick").touch()
    handle = send(PLACE, stub)
    _until(handle, State.FAILED)
    assert list(PLACE.logs(handle, follow=False)) == ["began", "shown"]
    (folder / "quick").unlink()
    handle = send(PLACE, stub)
    next(PLACE.logs(handle, follow=True))
    keeper = psutil.Process(handle["pid"])
    Path(handle["status"]).write_text("143")
    assert PLACE.status(handle) is State.RUNNING
    Path(handle["status"]).unlink()
    for process in (keeper, *keeper.children()):
        process.kill()
    _until(handle, State.LOST)
    Path(handle["status"]).write_text("143")  # asked to stop before it had begun
    assert PLACE.status(handle) is State.STOPPED


def test_a_job_whose_directory_was_removed_is_not_joined_by_another(stub: Submission) -> None:
    handle = send(PLACE, stub)
    _await_output(handle)
    shutil.rmtree(stub.directory)
    with pytest.raises(ConfigError, match=f"still runs, though its record is gone; end it first: kill -s TERM -- -{handle['pid']}"):
        send(PLACE, stub)
    os.killpg(handle["pid"], signal.SIGTERM)
    psutil.Process(handle["pid"]).wait(20)
    assert PLACE.status(send(PLACE, stub)) is State.RUNNING


def test_no_job_takes_the_log_or_the_status_of_another(stub: Submission, folder: Path) -> None:
    stub.files.mkdir(parents=True)
    for name in ("2.log", "3.status", "10.log", "config.yaml"):  # others were removed by hand
        (stub.files / name).touch()
    handle = PLACE.expected(stub)
    assert Path(handle["log"]).name == "11.log" and Path(handle["status"]).name == "11.status"
    with pytest.raises(PlaceError, match=r"there is no .*11\.log: its job has not begun, or the file was removed"):
        next(PLACE.logs(handle, follow=True))


def test_a_process_that_has_got_the_number_since_is_left_alone(stub: Submission) -> None:
    with subprocess.Popen(["/bin/sh", "-c", "sleep 60 & wait"]) as other:
        handle = {"host": socket.gethostname(), "pid": other.pid, "started": psutil.Process(other.pid).create_time() - 5, "status": "none"}
        PLACE.stop(handle)
        assert PLACE.status(handle) is State.LOST and psutil.Process(other.pid).is_running()
        for process in (*psutil.Process(other.pid).children(), other):
            process.send_signal(signal.SIGKILL)
    with pytest.raises(PlaceError, match="submitted on elsewhere"):
        PLACE.status({**handle, "host": "elsewhere"})


def test_no_secret_is_written(stub: Submission, folder: Path) -> None:
    send(PLACE, stub)
    written = [path for path in (folder / "runs").rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {submissions.RECORD, "config.yaml", "1.log"}
    assert not [path for path in written if CANARY in path.read_text()]
    assert {path.stat().st_mode & 0o77 for path in written if path.name in (submissions.RECORD, "config.yaml")} == {0}


def test_a_record_that_is_damaged_or_foreign_is_refused(stub: Submission, folder: Path) -> None:
    send(PLACE, stub)
    record = folder / "runs/toy" / submissions.RECORD
    whole = record.read_text()
    record.chmod(0o666)
    with pytest.raises(ConfigError, match="may be written by other users"):
        find("toy")
    record.chmod(0o600)
    for damaged in ("", "{}", whole[:100], whole.replace('"name": "local"', '"name": "elsewhere"'), '{"place": ' * 5_000):
        record.write_text(damaged)
        with pytest.raises(ConfigError, match=r"submission\.json"):
            find("toy")
    for damaged in (
        whole.replace('"host"', '"hots"'),
        re.sub('"pid": [0-9]+', '"pid": "x"', whole),
        whole.replace('"status": "/', '"status": ["/"], "a": "'),
    ):
        assert damaged != whole
        record.write_text(damaged)
        with pytest.raises(ConfigError, match=r"submission\.json: damaged; make sure that no job of this run is left .*, remove the file"):
            find("toy")
    record.unlink()
    record.symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="a link"):
        find("toy")


def test_a_name_nearly_right_is_told(stub: Submission) -> None:
    send(PLACE, stub)
    with pytest.raises(ConfigError, match="did you mean toy"):
        find("toi")
    with pytest.raises(ConfigError, match="submitted from here: toy"):
        find("../../etc")
