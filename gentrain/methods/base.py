"""The Method contract: roles, losses and the order of updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from gentrain.config import Component
from gentrain.models.base import Condition
from gentrain.noise import Noise
from gentrain.paths.base import Path

Batch = dict[str, Tensor]  # {"x": [B, ...], "label": [B] int64 if the data have classes}


@dataclass(frozen=True)
class Clock:
    """How far a run is, counted in samples seen."""

    samples: int  # seen before this step
    batch_size: int  # global: over all ranks and micro-batches
    total: int  # samples at which the run ends

    @property
    def step(self) -> int:
        return self.samples // self.batch_size

    @property
    def progress(self) -> float:
        """In [0, 1]."""
        return min(1.0, self.samples / self.total)


@dataclass
class Loss:
    """A scalar to descend: the mean over the rows it was given. `logs` are detached scalars, averaged over ranks when logged."""

    value: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Role:
    """A network's part in a method.

    Attributes:
        init: role whose initial weights it copies; None = its own (from the config's `roles.<role>.weights`, else random).
        denoiser: the method sees it as a Denoiser; False = the bare network (a classifier, a critic).
        classifier: its network reads x alone and gives logits, see models.base.
    """

    init: str | None = None
    denoiser: bool = True
    classifier: bool = False


@dataclass(frozen=True)
class Trained(Role):
    """A role that learns. `ema`: keep an exponential moving average of its weights; samples are drawn from the average."""

    ema: bool = False


@dataclass(frozen=True)
class Frozen(Role):
    """A role that never changes. Gradients may flow through its input."""


class Group(Protocol):
    """The ranks that train together; on one process each function is the identity (gather included)."""

    def mean(self, value: Tensor) -> Tensor:
        """Elementwise mean over the ranks, without gradient."""
        ...

    def gather(self, value: Tensor) -> Tensor:
        """[B, ...] of every rank -> [B * ranks, ...] in rank order, without gradient."""
        ...


class Nets(Protocol):
    """What a loss is handed: `nets.<role>` (a Denoiser, or a bare network) for every role, and `nets.group`.

    Only the role of the update under way receives gradients; every other role is frozen while its loss runs.
    """

    @property
    def group(self) -> Group: ...

    def __getattr__(self, role: str) -> Any:
        """A Denoiser, or what `(x, t, condition)` is called on for a role with denoiser=False."""
        ...


LossFunction = Callable[[Nets, Batch, Noise], Loss]


class Update:
    """One optimiser step of one role. Each loss is its own forward and backward, all before the step."""

    def __init__(self, role: str, *losses: LossFunction):
        self.role, self.losses = role, losses


class Method(Component, kind="method"):
    """One algorithm. Subclasses are registered dataclasses whose fields are its configuration.

    Attributes:
        roles: the networks it needs, by name.
        generator: the role that `sample`, `evaluate` and `export` use; None for methods that make no generator.
        guarded: metrics, or groups of them, that jump upwards only when training goes wrong (training.spike_guard watches them). A method
            with a loss that may do so in sound training, as that of an adversary, names those that may not.
    """

    roles: ClassVar[dict[str, Role]]
    generator: ClassVar[str | None] = None
    guarded: ClassVar[tuple[str, ...]] = ("loss", "grad_norm")

    def check(self, path: Path) -> None:
        """Raises ValueError, naming what would do, when the method does not work on the path. Called as the configuration loads."""

    def updates(self, clock: Clock) -> Iterator[Update]:
        """The updates of one step, in order. Called once per step on every rank; a role may appear more than once."""
        raise NotImplementedError


def condition_of(batch: Batch) -> Condition | None:
    """The batch's condition as denoisers take it."""
    return {"label": batch["label"]} if "label" in batch else None
