"""Ends a process whose rank makes no progress, with the stack of every thread of every rank on disk."""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from gentrain.training.world import World

log = logging.getLogger(__name__)

STACKS = "stacks"
SLOW = 10  # times the limit, for what comes seldom and may take long: loading and the first step, checkpoints, sample grids
GATHER_S = 10.0  # the time that other ranks have to write their stacks before the first one ends


def group_timeout_s(hang_timeout_s: float) -> float:
    """For collectives of the process group: longer than the watchdog lets anything take, since it leaves stacks and they do not."""
    return SLOW * hang_timeout_s + 60


def hang(stacks: Path) -> str:
    """The reason of an attempt that left these stacks."""
    return f"hung (training.hang_timeout_s); stacks: {stacks}"


class Watchdog:
    """Within it the process is ended (status 1) when `expect` is not called in time, or when another rank ends for that reason.

    Every rank first writes the stacks of its threads to <run>/stacks/<attempt>/rank-<n>.txt. The limit is counted in the watching
    thread's own seconds, so that a process that is paused, or a machine that is suspended, does not count as hung.

    Args:
        attempt: a name that all ranks of this attempt, and no other attempt, use.
        timeout_s: how long a step may take.
        on_hang: told why, on rank 0, before the process ends.
    """

    def __init__(self, directory: Path, world: World, attempt: str, timeout_s: float, on_hang: Callable[[str], None] = lambda reason: None):
        self.attempt, self._on_hang = attempt, on_hang
        self._stacks = directory / STACKS / attempt
        self._world, self._timeout_s = world, timeout_s
        self._expected = (0, SLOW)  # calls so far, factor of the last one: replaced as one, since a thread reads them
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def expect(self, factor: int = 1) -> None:
        """There is progress, and what follows now takes at most `factor` times the limit."""
        self._expected = (self._expected[0] + 1, factor)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        interval = min(1.0, self._timeout_s / 10)
        seen, idle = 0, 0.0
        while not self._done.wait(interval):
            calls, factor = self._expected
            idle = idle + interval if calls == seen else 0.0
            seen = calls
            if idle > factor * self._timeout_s or self._stacks.exists():
                self._end(idle)

    def _end(self, idle: float) -> None:
        mine = self._stacks / f"rank-{self._world.rank}.txt"
        try:
            self._stacks.mkdir(parents=True, exist_ok=True)
            with mine.open("w") as file:
                file.write(f"rank {self._world.rank} of {self._world.size}, pid {os.getpid()} on {socket.gethostname()}: ")
                file.write(f"{idle:.1f} s since the last progress\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
            self._await_others()
            if self._world.is_main:
                self._on_hang(hang(self._stacks))
            log.critical("no progress for %.0f s (training.hang_timeout_s): this attempt ends; stacks of all ranks: %s", idle, self._stacks)
        except OSError:
            faulthandler.dump_traceback()  # to stderr
        finally:  # the others wait for this rank
            sys.stderr.flush()
            os._exit(1)

    def _await_others(self) -> None:
        waited = 0.0
        while len(list(self._stacks.glob("rank-*.txt"))) < self._world.size and waited < GATHER_S:
            time.sleep(0.1)
            waited += 0.1
