"""Places: what `gentrain submit` sends a configuration to, and how what runs there is followed, stopped and gone on with.

A place renders a submission to texts, exactly those that it then sends. What is known of a submission afterwards is a handle: plain values,
kept with the submission in the run's directory, from which any later process finds the job again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from pydantic import NonNegativeInt, PositiveInt

from gentrain.config import Component, ConfigError, option

Handle = dict[str, Any]  # plain values, which JSON can hold


class State(Enum):
    """Of a submitted job."""

    PENDING = "pending"  # accepted, not running yet
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    STOPPED = "stopped"  # asked to; `gentrain resume` goes on
    FAILED = "failed"
    LOST = "lost"  # the place does not know it (any more)

    @property
    def is_over(self) -> bool:
        return self not in (State.PENDING, State.RUNNING)


@dataclass(frozen=True)
class Submission:
    """One run, recipe or sweep on its way to a place."""

    name: str  # letters, digits, `.`, `_` and `-`, the first a letter or digit, at most 63: that of its directory
    config: str  # self-contained YAML, `output` the run's directory at the place; `${oc.env:NAME}` stands for secrets
    command: tuple[str, ...]  # to run there, beside a file config.yaml that holds `config`: gentrain, train, run or sweep, config.yaml
    directory: Path  # of the run as this machine names it: where the handle and, at a place that shares it, results are
    output: str  # the same as the place names it, absolute
    environment: Mapping[str, str] = field(default_factory=dict)  # names and values, of the place's `environment`
    secrets: tuple[str, ...] = ()  # names of variables that the place has to give: of `${oc.env:NAME}`, and of the place's `secrets`
    trials: int = 0  # of a sweep
    under_ray: bool = False  # whether workers of Ray Train or trials of Ray Tune train; else all runs in the one process of `command`
    workers: tuple[int, int] = (1, 1)  # fewest and most that train together, over all stages
    cpus_per_worker: int = 1
    gpus_per_worker: float = 0.0
    grace_s: float = 0.0  # that the command may take for a checkpoint after a signal; 0 = as long as it takes
    interface: str | None = None  # network interface of the workers' traffic; None = any

    @property
    def files(self) -> Path:
        """Where what was rendered is kept on this machine, and what a place likes to keep beside it."""
        return self.directory / "submission"


@dataclass
class Place(Component, kind="place"):
    """Where a submission runs. Fields are the keys of `cluster.submit`.

    No method may put the value of a secret into a text, an argument, a handle or a file.
    """

    handle: ClassVar[Any] = Handle  # what a handle of this place holds, as a type

    environment: dict[str, str] = option(dict, "variables of the job and their values; not for secrets, which are named in `secrets`")
    secrets: list[str] = option(list, "names of variables that the job needs and whose values no file may hold")
    storage: str | None = option(None, "absolute directory there under which `output` lies; left out: the one this command runs in")

    def variants(self) -> list[list[str]]:
        """Overrides of each of the runs that one configuration becomes there; empty: it stays one. Raises ConfigError."""
        return []

    def render(self, submission: Submission) -> dict[str, str]:
        """File name -> text: exactly what `submit` would send. Raises ConfigError."""
        raise NotImplementedError

    def expected(self, submission: Submission) -> Handle:
        """A new handle, from which the job is found even if whoever sends it dies before the place has answered."""
        raise NotImplementedError

    def submit(self, submission: Submission, handle: Handle) -> Handle:
        """Sends it. Returns once the place has accepted it. What `render` gives has been written into `submission.files`.

        Called again for the same run when that is over: what the run's directory holds is gone on from. Raises ConfigError, PlaceError.

        Args:
            handle: what `expected` gave, which has been written down. What is returned takes its place.
        """
        raise NotImplementedError

    def status(self, handle: Handle) -> State:
        """Raises PlaceError when the place cannot be asked."""
        raise NotImplementedError

    def logs(self, handle: Handle, follow: bool) -> Iterator[str]:
        """Lines, without their ends, from the job's first; with `follow` as they come, to the job's end. Raises PlaceError."""
        raise NotImplementedError

    def stop(self, handle: Handle) -> None:
        """Asks for a checkpoint and the end, as SIGTERM does; returns at once. Nothing happens when it is over. Raises PlaceError."""
        raise NotImplementedError


def refuse_missing(secrets: Sequence[str]) -> None:
    """Raises ConfigError when a variable is missing that this process has to hand on."""
    for name in secrets:
        if name not in os.environ:
            raise ConfigError(f"the environment has no {name}, which the job needs; export it", key="cluster.submit.secrets")


class PlaceError(RuntimeError):
    """A place cannot be reached, or refuses: says which, why, and what to do."""


@dataclass
class Allocation(Place):
    """A place that gives nodes for a time, and gives them again to a job that was cut off."""

    nodes: PositiveInt = option(1, "machines")
    cpus_per_node: PositiveInt = option(1, "cores of each")
    gpus_per_node: NonNegativeInt = option(0, "accelerators of each")
    memory_gib: PositiveInt | None = option(None, "of each node; left out: what the place gives", unit="GiB")
    time_limit_min: PositiveInt | None = option(None, "after which the place ends the job; left out: the place's own", unit="min")
    restarts: NonNegativeInt = option(3, "times that the job is started again after preemption, a time limit or a lost node")

    def described(self) -> str:
        """What is asked for, in words."""
        each = f"{self.cpus_per_node} cores, {self.gpus_per_node} accelerators" + (f", {self.memory_gib} GiB" if self.memory_gib else "")
        limit = f"time limit {self.time_limit_min} min" if self.time_limit_min else "the time limit of the place"
        return f"{self.nodes} nodes of {each}; {limit}, started again up to {self.restarts} times"
