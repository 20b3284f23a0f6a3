"""Two processes in one directory: the second is refused with the first one's name; a dead one never blocks."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gentrain.config import ConfigError
from gentrain.training.lock import hold

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from gentrain.training.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)  # as a worker that outlives its parent for a while
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of tmp_path / run and has a child."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    child = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)
    process.stdout.close()


def test_the_second_is_refused_and_told_by_whom_and_for_how_long(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    time.sleep(1.1)
    with pytest.raises(ConfigError) as error, hold(tmp_path / "run"):
        raise AssertionError("two hold it")
    assert f"run is in use by pid {holder.pid} of " in str(error.value) and "choose another directory" in str(error.value)
    age = re.search(r"since ([\d.]+) s \(-c", str(error.value))
    assert age is not None and 1 <= float(age[1]) < 60
    assert holder.poll() is None


def test_values_of_the_command_line_are_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed leaves the file."""
    monkeypatch.setattr(sys, "argv", ["gentrain", "train", "x.yaml", "data.token=canary one=two", "--key=canary", "a=b\ncanary"])
    with hold(tmp_path):
        text = (tmp_path / ".run.owner").read_text()
        assert "canary" not in text and "gentrain train x.yaml data.token=... --key=..." in json.loads(text)["command"]


def test_a_killed_holder_blocks_nobody_even_if_its_child_lives_and_its_clock_was_ahead(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    os.utime(tmp_path / "run" / ".run.owner", (time.time() + 1e6,) * 2)
    with pytest.raises(ConfigError, match=r"since 0\.0 s"), hold(tmp_path / "run"):
        raise AssertionError("two hold it")
    holder.kill()
    holder.wait()
    with hold(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".run.owner").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / ".run.owner").exists()


def test_a_holder_that_ends_in_time_is_waited_for(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.send_signal(signal.SIGSTOP)  # alive, and still the holder
    with pytest.raises(ConfigError, match="in use"), hold(tmp_path / "run", wait_s=0.3):
        raise AssertionError("two hold it")
    killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {holder.pid}"])
    with hold(tmp_path / "run", wait_s=30):
        assert killer.wait() == 0


def test_what_is_in_the_way_of_the_name_is_told(tmp_path: Path) -> None:
    (tmp_path / ".run.owner").mkdir()
    with pytest.raises(ConfigError, match=r"output: .* cannot be written .*a directory is in the way: move it away"), hold(tmp_path):
        raise AssertionError("it was held without a name")
    (tmp_path / ".run.owner").rmdir()
    with hold(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "[" * 100_000, '{"pid": 1}'])
def test_an_owner_that_is_damaged_hides_no_holder(tmp_path: Path, text: str) -> None:
    with hold(tmp_path):
        (tmp_path / ".run.owner").write_text(text)
        with pytest.raises(ConfigError, match="in use by another process, which has not said its name yet"), hold(tmp_path):
            raise AssertionError("two hold it")


def test_the_name_of_a_holder_reaches_no_terminal(tmp_path: Path) -> None:
    with hold(tmp_path):
        owner = json.loads((tmp_path / ".run.owner").read_text()) | {"user": "\x1b[2J"}
        (tmp_path / ".run.owner").write_text(json.dumps(owner))
        with pytest.raises(ConfigError, match=r"\\x1b\[2J") as caught, hold(tmp_path):
            raise AssertionError("two hold it")
        assert str(caught.value).isprintable()


def test_names_are_separate_and_a_body_that_fails_frees(tmp_path: Path) -> None:
    with pytest.raises(KeyError), hold(tmp_path), hold(tmp_path, "writer"):
        raise KeyError
    with hold(tmp_path), hold(tmp_path, "writer"):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), hold(tmp_path):
        pass
    assert "has no locks" in caplog.text


def _as_nobody(function: Callable[[], None]) -> int:
    """The exit status of the function in a child process that may write almost nowhere."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_missing_permission_is_said_as_such() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to others
        theirs = Path(name)
        theirs.chmod(0o755)

        def try_it() -> None:
            for directory in (theirs, theirs / "new"):
                with pytest.raises(ConfigError, match=r"\(Permission denied\): this user may not write there"), hold(directory):
                    raise AssertionError("it may not be written")

        assert _as_nobody(try_it) == 0


def test_a_file_in_the_way_and_a_full_disk_are_said_as_such(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"a file .*in the way"), hold(directory):
            raise AssertionError("it is a file")
    (tmp_path / ".run.owner").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"No space left on device\): the disk is full: free some space"), hold(tmp_path):
        raise AssertionError("nothing can be written")
    assert not (tmp_path / ".run.owner").is_symlink()
    with hold(tmp_path):  # the refused one let go
        pass
