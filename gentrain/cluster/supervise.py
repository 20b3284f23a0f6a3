"""Starts the launcher of a run again when its process dies, as it does with the head of its Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from gentrain.cluster import session
from gentrain.cluster.attempts import backoff, note
from gentrain.cluster.session import ClusterLost
from gentrain.cluster.stopping import SIGNALS, STOPPED, heeded
from gentrain.cluster.stopping import asked as stop_asked
from gentrain.training.run import Cluster

log = logging.getLogger(__name__)


def supervise(body: Callable[[], int], cluster: Cluster, directory: Path) -> int:
    """The exit status of `body`, which runs in a child process, and again when that dies, up to `cluster.max_attempts` times in all.

    Signals are handed on. The body is asked to stop when this process dies. The caller has started no threads, and not Ray.

    Args:
        body: goes on from what is on disk whenever it is called. Raising ClusterLost counts as a death.
        directory: where deaths are written down.
    """
    relay = _Relay()
    handlers = {number: signal.signal(number, relay) for number in heeded()}
    try:
        return _attempts(lambda: _run(body, relay, handlers), relay, cluster, directory)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Relay:
    """Hands signals on to the launcher, while there is one."""

    def __init__(self) -> None:
        self.asked = stop_asked()
        self.to: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self.to is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.to, number)


def _attempts(run: Callable[[], int | str], relay: _Relay, cluster: Cluster, directory: Path) -> int:
    outcome: int | str = ""
    for attempt in range(1, cluster.max_attempts + 1):
        session.prepare()
        outcome = run()
        if isinstance(outcome, int):
            return outcome
        session.tidy(keep=attempt == cluster.max_attempts and not relay.asked)
        if not relay.asked:
            directory.mkdir(parents=True, exist_ok=True)
            note(directory, "failed", reason=outcome)
        if attempt < cluster.max_attempts and not relay.asked:
            wait_s = backoff(attempt, cluster.backoff_s)
            log.warning("%s; attempt %d of %d follows in %.0f s", outcome, attempt + 1, cluster.max_attempts, wait_s)
            until = time.monotonic() + wait_s
            while time.monotonic() < until and not relay.asked:
                time.sleep(0.1)
        if relay.asked:
            log.warning("%s; it was asked to stop: what was published before stays, and the same command goes on from there", outcome)
            return STOPPED
    log.error("%s; that was attempt %d (cluster.max_attempts); what the last checkpoint holds is kept", outcome, cluster.max_attempts)
    return 1


def _run(body: Callable[[], int], relay: _Relay, handlers: dict[signal.Signals, Any]) -> int | str:
    """The status that the child process came to, or in words how it died without one."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: _child(body, theirs, handlers), name="launcher")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there is somebody to hand them on to, who can take them
    try:
        if relay.asked:
            return "the launcher was not started"
        process.start()
        relay.to = process.pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    process.join()
    relay.to = None
    with ours, contextlib.suppress(EOFError):
        outcome: int | str = ours.recv()
        return outcome
    assert process.pid is not None and process.exitcode is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a head of our own, or what is left of it
    how = f"of {signal.Signals(-process.exitcode).name}" if process.exitcode < 0 else f"with status {process.exitcode}"
    return f"the launcher died {how}, as it does when the head of its Ray cluster is lost"


def _child(body: Callable[[], int], outcome: Connection, handlers: dict[signal.Signals, Any]) -> None:
    os.setpgid(0, 0)  # a Ctrl-C of the terminal reaches it once, through the parent; and it can be ended with what it has started
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_stop_with_parent, name="parent", daemon=True).start()
    try:
        outcome.send(body())
    except ClusterLost as error:
        outcome.send(str(error))
    except Exception:  # a mistake of ours, which another attempt would repeat
        outcome.send(1)
        raise


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
