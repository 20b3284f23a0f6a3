"""The journal of a run: when it was started, on how many ranks and from where, and why it had to be started again."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from gentrain.training.callbacks import Callback
from gentrain.training.loop import Trainer
from gentrain.training.watchdog import STACKS

ATTEMPTS = "attempts.jsonl"
LONGEST_BACKOFF_S = 300.0


def note(directory: Path, event: str, **details: Any) -> None:
    """Appends a line to attempts.jsonl; lines of several processes do not mix."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, "host": socket.gethostname(), **details}
    with (directory / ATTEMPTS).open("a") as file:
        file.write(json.dumps(line) + "\n")


class Started(Callback):
    """Writes down on how many ranks an attempt begins, and from where."""

    def __init__(self, trainer: Trainer):
        if trainer.world.is_main:
            note(trainer.run.directory, "started", ranks=trainer.world.size, samples=trainer.clock.samples)


def last_failure(directory: Path) -> str:
    """Why the newest attempt that failed did so, with where the stacks of its ranks are if it hung; empty if none has failed."""
    try:
        lines = [json.loads(line) for line in (directory / ATTEMPTS).read_text().splitlines()]
    except (OSError, ValueError):
        return ""
    return next((line["reason"] for line in reversed(lines) if line["event"] == "failed"), "")


def stacks_of(directory: Path) -> set[str]:
    """The attempts that hung."""
    return {str(path) for path in (directory / STACKS).glob("*")}


def backoff(restarts: int, first_s: float) -> float:
    """Seconds to wait before restart number `restarts` = 1, 2, ...: doubled each time, at most five minutes."""
    return min(first_s * 2 ** (restarts - 1), LONGEST_BACKOFF_S)
