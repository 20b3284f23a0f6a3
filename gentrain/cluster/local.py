"""The place `local`: a process of this machine that goes on when the terminal is closed."""

from __future__ import annotations

import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NotRequired

import psutil
from typing_extensions import TypedDict

from gentrain.cluster.places import Handle, Place, PlaceError, State, Submission, refuse_missing
from gentrain.cluster.stopping import STOPPED
from gentrain.config import ConfigError, register

# Outlives the command, to write its exit status down. $0 is the file; the trap lets it outlive a signal to all of them, too.
_KEEPER = 'trap : INT TERM HUP USR1; "$@"; echo $? > "$0.tmp" && mv "$0.tmp" "$0"'


class _Handle(TypedDict):
    host: str
    log: str
    status: str
    pid: NotRequired[int]  # and `started`, the time in s: left out until the process is there
    started: NotRequired[float]


@register("local")
@dataclass
class Local(Place):
    """A detached process on this machine, with a log file and its exit status in the run's directory."""

    handle: ClassVar[Any] = _Handle

    def __post_init__(self) -> None:
        if self.storage is not None:
            raise ConfigError("this machine has its own directories; set `output`", key="storage")

    def render(self, submission: Submission) -> dict[str, str]:
        """config.yaml, and what is run beside what this process has in its environment."""
        config = submission.files.resolve() / "config.yaml"
        exports = [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        # `exec`: the signal of `stop` must reach the command, not a shell above it.
        command = "exec " + shlex.join([sys.executable, "-m", "gentrain.cli", *submission.command[1:-1], str(config)])
        return {"config.yaml": submission.config, "job.sh": "\n".join(["#!/bin/sh", *exports, command]) + "\n"}

    def expected(self, submission: Submission) -> Handle:
        taken = [int(path.stem) for path in submission.files.glob("*.*") if path.suffix in (".log", ".status") and path.stem.isdecimal()]
        number = max(taken, default=0) + 1
        log, status = (str(submission.files.resolve() / f"{number}{suffix}") for suffix in (".log", ".status"))
        return {"host": socket.gethostname(), "log": log, "status": status}

    def submit(self, submission: Submission, handle: Handle) -> Handle:
        refuse_missing(submission.secrets)
        for process, line in _keepers():
            if Path(line[3]).parent == Path(handle["status"]).parent:  # two would write into one directory
                remedy = f"end it first: kill -s TERM -- -{process.pid}"
                raise ConfigError(f"an earlier job of this directory still runs, though its record is gone; {remedy}", key="output")
        job = ["/bin/sh", str(submission.files.resolve() / "job.sh")]
        with Path(handle["log"]).open("xb") as output:
            process = subprocess.Popen(
                [*_keeping(handle), *job], start_new_session=True, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        return {**handle, "pid": process.pid, "started": psutil.Process(process.pid).create_time()}

    def status(self, handle: Handle) -> State:
        if _keeper(handle) is not None:
            return State.RUNNING
        try:
            status = int(Path(handle["status"]).read_text())
        except (OSError, ValueError):  # both processes were killed, or the machine
            return State.LOST
        early = 128 + signal.SIGTERM  # `stop` came before the command could tell what that means
        return {0: State.SUCCEEDED, STOPPED: State.STOPPED, early: State.STOPPED}.get(status, State.FAILED)

    def logs(self, handle: Handle, follow: bool) -> Iterator[str]:
        path = Path(handle["log"])
        if not path.exists():
            raise PlaceError(f"there is no {path}: its job has not begun, or the file was removed; see gentrain status")
        with path.open(errors="replace") as file:
            begun = ""
            while True:
                over = not follow or _keeper(handle) is None  # asked before reading: what is written last is read, too
                for part in file:
                    begun += part
                    if begun.endswith("\n"):
                        yield begun[:-1]
                        begun = ""
                if over:
                    break
                time.sleep(0.2)
            if begun:
                yield begun

    def stop(self, handle: Handle) -> None:
        keeper = _keeper(handle)
        for process in keeper.children() if keeper is not None else ():
            with suppress(psutil.NoSuchProcess):  # it has ended since
                process.send_signal(signal.SIGTERM)


def _keeping(handle: Handle) -> list[str]:
    """How the command of the process begins that keeps a job: with a file that is no other job's."""
    return ["/bin/sh", "-c", _KEEPER, handle["status"]]


def _keepers() -> Iterator[tuple[psutil.Process, list[str]]]:
    """Every process of this machine that keeps a job, with its command line."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if line[:3] == ["/bin/sh", "-c", _KEEPER] and len(line) > 3:
            yield process, line


def _keeper(handle: Handle) -> psutil.Process | None:
    """The process of a handle if it still runs, and not another one that has got its number since."""
    if handle["host"] != socket.gethostname():
        raise PlaceError(f"it was submitted on {handle['host']}, and only that machine knows of it; ask there")
    if "pid" not in handle:  # who submitted it died before it could write the number down
        return next((process for process, line in _keepers() if line[:4] == _keeping(handle)), None)
    try:
        process = psutil.Process(handle["pid"])
        alive = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - handle["started"]) < 0.1
    except psutil.NoSuchProcess:
        return None
    return process if alive else None
