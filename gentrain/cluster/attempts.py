"""The journal of a run: when it was started, on how many ranks and from where, and why it had to be started again."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gentrain.training.callbacks import Callback
from gentrain.training.loop import Trainer
from gentrain.training.watchdog import STACKS

ATTEMPTS = "attempts.jsonl"
LONGEST_BACKOFF_S = 300.0
_SLURM = {"slurm_job": "SLURM_JOB_ID", "slurm_restarts": "SLURM_RESTART_COUNT"}  # the second one only of a job that was requeued
_ENDS = ("finished", "stopped", "abandoned", "failed", "preempted")


def note(directory: Path, event: str, **details: Any) -> None:
    """Appends a line to attempts.jsonl, behind one that a kill or a full disk has cut; lines of several processes do not mix."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, "host": socket.gethostname(), **details}
    with (directory / ATTEMPTS).open("a+b") as file:
        cut = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n"
        file.write(b"\n" * cut + json.dumps(line).encode() + b"\n")


class Started(Callback):
    """Writes down on how many ranks an attempt begins, and from where, and that Ray Train has replaced the workers of the one before."""

    def __init__(self, trainer: Trainer):
        if not trainer.world.is_main:
            return
        directory, ranks = trainer.run.directory, trainer.world.size
        before: dict[str, Any] = next((line for line in reversed(_lines(directory)) if line.get("event") in ("started", *_ENDS)), {})
        if before.get("event") == "started":  # of all that ends an attempt this alone has nobody who is told
            had = before.get("ranks")
            grown = ", for which the cluster has room now" if isinstance(had, int) and ranks > had else ""
            note(directory, "replaced", reason=f"Ray Train has replaced {had} workers by {ranks}{grown}")
        about = {"attempt": trainer.attempt, "ranks": ranks, "samples": trainer.clock.samples}
        job = {key: os.environ[name] for key, name in _SLURM.items() if name in os.environ}
        note(directory, "started", **about, **job)


@contextmanager
def noted(directory: Path, rank: int) -> Iterator[None]:
    """Writes down why the body, an attempt on this rank, did not come to its end."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        with suppress(OSError):  # a full disk, which is then the error
            note(directory, "failed", reason=short(f"rank {rank}: {type(error).__name__}: {error}"))
        raise


def note_silence(directory: Path) -> None:
    """Writes down that the newest attempt never came to its end, if so. For whoever holds the directory's lock."""
    lines = _lines(directory)
    if lines and lines[-1].get("event") not in _ENDS:
        note(directory, "failed", reason="ended without a word: killed, or lost with its machine")


def short(text: str) -> str:
    """One line; of a long one its beginning, which says what failed, and its end, which says why."""
    line = " ".join(text.split())
    return line if len(line) <= 500 else f"{line[:150]} ... {line[-350:]}"


def _lines(directory: Path) -> list[dict[str, Any]]:
    """Those that are whole."""
    found = []
    with suppress(OSError):
        for line in (directory / ATTEMPTS).read_text(errors="replace").splitlines():
            with suppress(ValueError, RecursionError):
                found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def last_failure(directory: Path) -> str:
    """Why the newest attempt that failed did so, with where the stacks of its ranks are if it hung; empty if none has failed."""
    return next((str(line.get("reason", "")) for line in reversed(_lines(directory)) if line.get("event") == "failed"), "")


def stacks_of(directory: Path) -> set[str]:
    """The attempts that hung."""
    return {str(path) for path in (directory / STACKS).glob("*")}


def backoff(restarts: int, first_s: float) -> float:
    """Seconds to wait before restart number `restarts` = 1, 2, ...: doubled each time, at most five minutes."""
    return min(first_s * 2 ** (restarts - 1), LONGEST_BACKOFF_S)
