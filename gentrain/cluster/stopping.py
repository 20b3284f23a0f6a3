"""Asking a command to stop: Ctrl-C, a signal of the scheduler, a terminal that is closed, or a file in the run's directory.

Imports nothing that takes long: a signal may come before anything else of a command is there.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

STOP_FILE = ".stop"
STOPPED = 75  # EX_TEMPFAIL: the exit status of what may be run again to go on
# SLURM's --signal is usually told to send USR1, by some launchers USR2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class StopRequested(BaseException):
    """A signal has asked a command to stop where there is nothing to publish first. As KeyboardInterrupt, it is no error to be caught."""


class StopFlag:
    """Set by the first signal; the second Ctrl-C interrupts at once.

    Attributes:
        signal: name of the first one; empty as long as none has come.
        raises: whether the first signal also raises StopRequested wherever the program is; False while somebody asks the flag.
    """

    def __init__(self) -> None:
        self.is_set = self.raises = False
        self.signal = ""

    def __call__(self) -> bool:
        return self.is_set

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals."""
        if number == signal.SIGHUP:
            _leave_terminal()
        if self.is_set:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.is_set, self.signal = True, signal.Signals(number).name
        if self.raises:
            raise StopRequested


_command: StopFlag | None = None  # of the whole command, once `receive` has been called


def heeded() -> list[signal.Signals]:
    """SIGNALS, without the SIGHUP that `nohup` has had ignored."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def goes_on() -> bool:
    """Whether the command of this process is one that a signal stops in order, to be gone on with."""
    return sys.argv[1:2] in (["train"], ["run"], ["sweep"])


def receive() -> None:
    """From now to the end of this process signals ask it to stop. Where nobody looks, see `interruptible`. Called again, does nothing."""
    global _command
    if _command is not None:
        return
    _command = StopFlag()
    for number in heeded():
        signal.signal(number, _command.receive)


def settle(status: int) -> None:
    """The command has come to its status: signals change it no more, while Python and what it has loaded come to their end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, lambda *_: os._exit(status))  # the end may hang


def asked() -> bool:
    """Whether a signal has asked this command to stop."""
    return _command is not None and _command.is_set


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Within it signals set the flag, which is the command's own if `receive` has been called. Main thread only."""
    flag = _command or StopFlag()
    raised, flag.raises = flag.raises, False
    previous = {number: signal.signal(number, flag.receive) for number in heeded()}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        flag.raises = raised


@contextmanager
def interruptible() -> Iterator[None]:
    """Within it a signal to the command raises StopRequested, at once if it has come before: for what takes long and publishes nothing.

    Not in a rank of several: the others would wait for it, so it stops with them before its first step.
    """
    if _command is None or os.environ.get("WORLD_SIZE", "1") != "1":
        yield
        return
    raised, _command.raises = _command.raises, True
    try:
        if _command.is_set:
            raise StopRequested
        yield
    finally:
        _command.raises = raised


@contextmanager
def kept() -> Iterator[None]:
    """Signals mean after the body what they meant before, though it replaces the handler of SIGTERM with one that calls sys.exit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    except SystemExit as error:
        raise StopRequested from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """What is printed on a terminal that is gone would raise."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
                os.dup2(null, number)
    os.close(null)


class StopFile:
    """`should_stop` of a worker: whether somebody has put the stop file into the run's directory. Looks at most twice a second."""

    def __init__(self, directory: Path):
        self._path, self._looked, self._found = directory / STOP_FILE, 0.0, False

    def __call__(self) -> bool:
        if not self._found and time.monotonic() - self._looked > 0.5:
            self._looked, self._found = time.monotonic(), self._path.exists()
        return self._found
