"""kubectl: what it is told and prints, and logs of pods, which can be followed through lost connections."""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

from gentrain.cluster.places import PlaceError

log = logging.getLogger(__name__)

_POLL_S = 5.0  # between questions about what is followed
_PATIENCE_S = 600.0  # for Kubernetes to answer again


class Kubectl:
    """Every method raises PlaceError when kubectl is not installed or fails."""

    def __init__(self, namespace: str):
        self._namespace = namespace

    def tell(self, *arguments: str, given: str | None = None) -> str:
        """What kubectl prints."""
        command = self._command(*arguments)
        try:
            return subprocess.run(command, input=given or "", capture_output=True, text=True, check=True).stdout
        except FileNotFoundError as error:
            raise _missing() from error
        except subprocess.CalledProcessError as error:
            raise PlaceError(f"{shlex.join(command)}: {error.stderr.strip() or f'status {error.returncode}'}") from error

    def get(self, resource: str) -> dict[str, Any] | None:
        """What Kubernetes holds of `kind/name`."""
        shown = self.tell("get", resource, "--ignore-not-found", "--output=json")
        try:
            return json.loads(shown) if shown.strip() else None
        except ValueError as error:
            raise PlaceError(f"kubectl does not print what {resource} is, but: {shown.strip():.200}") from error

    def pods(self, selector: str) -> list[str]:
        """pod/name of each, the oldest first."""
        return self.tell("get", "pods", f"--selector={selector}", "--sort-by=.metadata.creationTimestamp", "--output=name").split()

    def lines(self, *arguments: str) -> Iterator[str]:
        """What kubectl prints, as it comes."""
        command = self._command(*arguments)
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace")
        except FileNotFoundError as error:
            raise _missing() from error
        with process:
            try:
                assert process.stdout is not None and process.stderr is not None
                for line in process.stdout:
                    yield line.rstrip("\n")
                if process.wait():
                    raise PlaceError(f"{shlex.join(command)}: {process.stderr.read().strip() or f'status {process.returncode}'}")
            finally:
                process.terminate()

    def logs(self, selector: str, is_over: Callable[[], bool], follow: bool) -> Iterator[str]:
        """Lines of the pods, one pod after another; with `follow` as they come, until `is_over`.

        A connection that is lost is made anew, and no line is told twice or left out. Kubernetes may be away for _PATIENCE_S.
        """
        logs: dict[str, _PodLog] = {}
        answered, away, complaint, tries = False, 0.0, "", 3
        while True:
            try:
                over = not follow or is_over()  # asked before reading: what is written last is read, too
                pods = self.pods(selector)
                answered, away, failed = True, 0.0, False
            except PlaceError as error:
                away = away or time.monotonic()
                if not answered or time.monotonic() - away > _PATIENCE_S:
                    raise
                complaint = _told_once(error, complaint)
                over, pods, failed = False, [], True
            for pod in pods:
                try:
                    yield from logs.setdefault(pod, _PodLog(self, pod)).new(follow=not over)
                except PlaceError as error:  # of a container that has not started, a pod that is gone, or a connection
                    if not follow:
                        raise
                    complaint, failed = _told_once(error, complaint), True
            tries -= over
            if over and (not failed or not tries):
                return
            time.sleep(_POLL_S)

    def _command(self, *arguments: str) -> list[str]:
        return ["kubectl", f"--namespace={self._namespace}", *arguments]


class _PodLog:
    """The log of one pod, by the times that Kubernetes gives its lines (RFC 3339 of one width, so that they sort as text)."""

    def __init__(self, kubectl: Kubectl, pod: str):
        self._kubectl, self._pod = kubectl, pod
        self._last, self._of_last = "", 0  # the latest time told, and how many lines of it have been

    def new(self, follow: bool) -> Iterator[str]:
        """Lines that have not been told yet. Raises PlaceError."""
        since = [f"--since-time={self._last}"] if self._last else ["--tail=-1"]  # Kubernetes begins with that second
        known, left = self._last, self._of_last
        for stamped in self._kubectl.lines("logs", self._pod, "--timestamps", *since, *(["--follow"] if follow else [])):
            time_, _, line = stamped.partition(" ")
            if time_ < known:
                continue
            if time_ == known and left:
                left -= 1
                continue
            if time_ > self._last:
                self._last, self._of_last = time_, 0
            self._of_last += time_ == self._last
            yield line


def _told_once(error: PlaceError, before: str) -> str:
    if str(error) != before:
        log.warning("%s; it is tried again", error)
    return str(error)


def _missing() -> PlaceError:
    return PlaceError("kubectl is not installed here; install it, and give it access to the cluster")
