"""Asking a run to stop: Ctrl-C, a signal of the scheduler, or a file in the run's directory."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP_FILE = ".stop"
STOPPED = 75  # EX_TEMPFAIL: the exit status of what may be run again to go on
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Set by the first signal; the second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.is_set = False

    def __call__(self) -> bool:
        return self.is_set

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.is_set = True


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Within it SIGINT, SIGTERM and SIGUSR1 (what SLURM's --signal is usually told to send) set the flag. Main thread only."""
    flag = StopFlag()
    previous = {number: signal.signal(number, flag._receive) for number in SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopFile:
    """`should_stop` of a worker: whether somebody has put the stop file into the run's directory. Looks at most twice a second."""

    def __init__(self, directory: Path):
        self._path, self._looked, self._found = directory / STOP_FILE, 0.0, False

    def __call__(self) -> bool:
        if not self._found and time.monotonic() - self._looked > 0.5:
            self._looked, self._found = time.monotonic(), self._path.exists()
        return self._found
