"""What processes leave behind: told by TMPDIR, which all that a command starts inherit, or by their session."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil


def processes(scratch: Path) -> list[psutil.Process]:
    """Those that have `scratch` for their temporary directory. Zombies have no environment and do not count."""
    found = [each for each in psutil.process_iter(["environ"]) if (each.info["environ"] or {}).get("TMPDIR") == str(scratch)]
    return [each for each in found if each.pid != os.getpid()]


def await_none(scratch: Path, timeout_s: float) -> None:
    """Waits until none of them is left; AssertionError, and they are killed, when some are. Whoever has no process has no open port."""
    deadline = time.monotonic() + timeout_s
    while (left := processes(scratch)) and time.monotonic() < deadline:
        time.sleep(0.2)
    told = []
    for each in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            told.append(" ".join(each.cmdline())[:200])
            each.kill()
    assert told == []


@contextlib.contextmanager
def sessions_ended() -> Iterator[None]:
    """At its end nothing is left of the sessions that children of this process have begun within it."""
    before = {child.pid for child in psutil.Process().children()}
    yield
    left = [child for child in psutil.Process().children() if child.pid not in before]
    for child in left:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # all at once: one by one, a process that is just being started is missed
    psutil.wait_procs(left, timeout=10)
