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
from gentrain.cluster.stopping import SIGNALS, STOPPED
from gentrain.training.run import Cluster

log = logging.getLogger(__name__)


def supervise(body: Callable[[], int], cluster: Cluster, directory: Path) -> int:
    """The exit status of `body`, which runs in a child process, and again when that dies, up to `cluster.max_attempts` times in all.

    Signals are handed on. The body is asked to stop when this process dies. The caller has started no threads, and not Ray.

    Args:
        body: goes on from what is on disk whenever it is called. Raising ClusterLost counts as a death.
        directory: where deaths are written down.
    """
    for attempt in range(1, cluster.max_attempts + 1):
        session.prepare()
        outcome, asked = _run(body)
        if isinstance(outcome, int):
            return outcome
        session.tidy(keep=attempt == cluster.max_attempts and not asked)
        if asked:
            return STOPPED
        directory.mkdir(parents=True, exist_ok=True)
        note(directory, "failed", reason=outcome)
        if attempt < cluster.max_attempts:
            wait_s = backoff(attempt, cluster.backoff_s)
            log.warning("%s; attempt %d of %d follows in %.0f s", outcome, attempt + 1, cluster.max_attempts, wait_s)
            time.sleep(wait_s)
    log.error("%s; that was attempt %d (cluster.max_attempts); what the last checkpoint holds is kept", outcome, cluster.max_attempts)
    return 1


def _run(body: Callable[[], int]) -> tuple[int | str, bool]:
    """The status that the child process came to, or in words how it died without one; and whether it was asked to stop."""
    asked: list[int] = []
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: _child(body, theirs, handlers), name="launcher")

    def hand_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if process.pid is not None:
            os.kill(process.pid, number)

    handlers = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        process.start()
        theirs.close()
        process.join()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    with ours, contextlib.suppress(EOFError):
        outcome: int | str = ours.recv()
        return outcome, bool(asked)
    assert process.pid is not None and process.exitcode is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a head of our own, or what is left of it
    how = f"of {signal.Signals(-process.exitcode).name}" if process.exitcode < 0 else f"with status {process.exitcode}"
    return f"the launcher died {how}, as it does when the head of its Ray cluster is lost", bool(asked)


def _child(body: Callable[[], int], outcome: Connection, handlers: dict[signal.Signals, Any]) -> None:
    os.setpgid(0, 0)  # a Ctrl-C of the terminal reaches it once, through the parent; and it can be ended with what it has started
    for number, handler in handlers.items():
        signal.signal(number, handler)
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
