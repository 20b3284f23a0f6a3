"""The Method contract: roles, losses and the order of updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from gentrain.config import Component
from gentrain.data.base import Data
from gentrain.data.pool import KnownLikelihood, Pool
from gentrain.extractors.base import Extractor
from gentrain.models.base import Codec, Condition, Model
from gentrain.models.denoiser import Prediction
from gentrain.models.heads import Heads
from gentrain.noise import Noise
from gentrain.paths.base import Path
from gentrain.samplers.base import Sampler
from gentrain.samplers.euler import Euler

Batch = dict[str, Tensor]  # {"x": [B, ...], "label": [B] int64 if the data have classes, "condition/...": [B, ...] what a codec adds}


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
        denoiser: the method sees it as a Denoiser, or a TokenModel; False = the bare network (a classifier, a critic).
        classifier: its network reads x alone and gives logits, see models.base.
        inputs: what its network reads of the condition beside the label, see models.inputs. Weights without them may be loaded.
        model: its network where the config names none for the role; None = the run's.
        flow: its weights must be those of a generator whose flow samplers follow, no few-step student's.
        one_step: its weights must be those of a generator that is drawn from by the method's own sampler, if they are of a run that trains.
        alike: its weights, if they are those of a student of one or a few calls, must be of one that the method's own sampler draws from.
        consistency: its weights must be those of a consistency function, if they are of a run that trains.
        given: the config must name its weights, or a pretrained network: random ones would teach nothing.
        control: its network has a branch for this control, see models.control. Weights without one may be loaded.
        heads: what it learns in place of a network: heads on the features of one that starts as `init` does.
    """

    init: str | None = None
    denoiser: bool = True
    classifier: bool = False
    inputs: tuple[str, ...] = ()
    model: Model | None = None
    given: bool = False
    flow: bool = False
    one_step: bool = False
    alike: bool = False
    consistency: bool = False
    control: Extractor | None = None
    heads: Heads | None = None


@dataclass(frozen=True)
class Trained(Role):
    """A role that learns. `ema`: keep an exponential moving average of its weights; samples are drawn from the average.

    `trainable`: regular expression, it learns only the parameters in whose names this is found, where the configuration says no other part.
    """

    ema: bool = False
    trainable: str | None = None


@dataclass(frozen=True)
class Frozen(Role):
    """A role that never changes. Gradients may flow through its input."""


class Group(Protocol):
    """The ranks that train together; on one process each function is the identity (gather included).

    `rank` and `size` are for functions that exchange in a pattern of their own, such as round a ring; a loss never branches on them.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def mean(self, value: Tensor) -> Tensor:
        """Elementwise mean over the ranks, without gradient."""
        ...

    def gather(self, value: Tensor) -> Tensor:
        """[B, ...] of every rank -> [B * ranks, ...] in rank order, without gradient."""
        ...

    def shift(self, value: Tensor, steps: int) -> Callable[[], Tensor]:
        """Begins to send `value` to the rank `steps` further (round the end; negative: back), which must have a `value` of the same shape.

        Returns what waits for the one that comes from as many ranks before. Without gradient; `value` must not change meanwhile.
        """
        ...


class Nets(Protocol):
    """What a loss is handed: `nets.<role>` (a Denoiser, or a bare network) for every role, `nets.group` and `nets.decode`.

    Only the role of the update under way receives gradients; every other role is frozen while its loss runs.
    """

    @property
    def group(self) -> Group: ...

    def decode(self, x: Tensor) -> Tensor:
        """x as methods see it [B, ...], latents of a pipeline say, -> data [B, ...], images in [-1, 1]; gradients flow through."""
        ...

    def __getattr__(self, role: str) -> Any:
        """A Denoiser, or what `(x, t, condition)` is called on for a role with denoiser=False."""
        ...


LossFunction = Callable[[Nets, Batch, Noise], Loss]


class Update:
    """One optimiser step of one role. Each loss is its own forward and backward, all before the step."""

    def __init__(self, role: str, *losses: LossFunction):
        self.role, self.losses = role, losses


@dataclass(frozen=True)
class Follow:
    """An update without a loss: the weights of `role` become decay * weights + (1 - decay) * those of the role `of`.

    Both have engines of one kind, so that no weights are gathered. The averaged role is Trained in the method's `roles`, with the other as
    its `init`; it keeps no optimiser state that is used.
    """

    role: str
    of: str
    decay: float


class Method(Component, kind="method"):
    """One algorithm. Subclasses are registered dataclasses whose fields are its configuration.

    Attributes:
        roles: the networks it needs, by name.
        generator: the role that `sample`, `evaluate` and `export` use; None for methods that make no generator.
        guarded: metrics, or groups of them, that jump upwards only when training goes wrong (training.spike_guard watches them). A method
            with a loss that may do so in sound training, as that of an adversary, names those that may not.
        predictions: what networks may predict; None = anything.
        dropout: whether units of the networks that learn are dropped while they do.
        weighs: whether rows count in its loss by the "weight" of the batch, where the data have one.
        of_tokens: data, networks and sampler are those of tokens: the method sees each denoiser as a `TokenModel`.
        forward_mode: the roles whose networks are differentiated in forward mode (jvp).
    """

    roles: ClassVar[dict[str, Role]]
    generator: ClassVar[str | None] = None
    guarded: ClassVar[tuple[str, ...]] = ("loss", "grad_norm")
    predictions: ClassVar[tuple[Prediction, ...] | None] = None
    dropout: ClassVar[bool] = True
    weighs: ClassVar[bool] = False
    of_tokens: ClassVar[bool] = False

    @property
    def forward_mode(self) -> tuple[str, ...]:
        return ()

    @property
    def reads_data(self) -> bool:
        """Whether it learns from the data themselves; False = from their shape, labels and prompts at most, so that x may be blank."""
        return True

    def check(self, path: Path) -> None:
        """Raises ValueError, or ConfigError about one of its keys, naming what would do, when the method does not work on the path.

        Called as the configuration loads.
        """

    def check_data(self, data: Data) -> None:
        """Takes from the data set what the method must know (the numbers of classes that it names). Called as the configuration loads.

        Raises ValueError, or ConfigError about one of its keys, when the method does not work on the data.
        """

    def fit(self) -> None:
        """Records in the configuration what it takes from outputs of earlier stages. Raises ConfigError. Called before training."""

    def learning(self, role: str) -> dict[str, Tensor] | None:
        """Which weights of a role that learns do: parameter name -> bool of its shape; None = all. Raises ConfigError.

        Asked before training. Needs an elementwise optimiser without weight decay, and ZeRO 2 at most.
        """
        return None

    def pools(self) -> dict[str, Pool]:
        """Samples that each step reads beside the data, as many: name -> pool; the batch has them as "<name>/x" and "<name>/label"."""
        return {}

    def known_likelihood(self) -> KnownLikelihood | None:
        """What a role said of the tokens of the data and the pools; their rows have it as "log_prob" and "null_log_prob" [B, T]."""
        return None

    def diverged(self, record: Mapping[str, float]) -> str | None:
        """Why the run must end, if so, with the remedy: told each line of metrics, the same on every rank."""
        return None

    @property
    def held_out(self) -> int:
        """How many held-out items `examine` is to see, at most, for each line of metrics; 0 = it is not asked."""
        return 0

    def examine(self, network: nn.Module, batch: Batch, codec: Codec) -> dict[str, float]:
        """What held-out data say of the network of its first role: name -> number. Called on every rank, with the same result."""
        raise NotImplementedError

    @property
    def steering(self) -> Extractor | None:
        """The control that its generator is given beside the condition; None = it has none."""
        return None if self.generator is None else self.roles[self.generator].control

    def own_sampler(self) -> Sampler:
        """What draws from the generator where the configuration names no sampler."""
        return Euler()

    def check_sampler(self, sampler: Sampler) -> None:
        """Raises ValueError, naming what would do, when the sampler does not draw what the generator was trained to give."""

    def updates(self, clock: Clock) -> Iterator[Update | Follow]:
        """The updates of one step, in order. Called once per step on every rank; a role may appear more than once."""
        raise NotImplementedError


def condition_of(batch: Batch) -> Condition | None:
    """The batch's condition as denoisers take it."""
    condition = {key.removeprefix("condition/"): value for key, value in batch.items() if key == "label" or key.startswith("condition/")}
    return condition or None


def weighed(loss: Tensor, batch: Batch) -> Tensor:
    """Each row's loss [B] times its weight in the batch, if there are weights; the mean of that estimates the weighted loss of the data."""
    return loss * batch["weight"].to(loss) if "weight" in batch else loss


def part_of(batch: Batch, name: str) -> Batch:
    """The rows of the pool `name`, as a batch."""
    return {key.removeprefix(f"{name}/"): value for key, value in batch.items() if key.startswith(f"{name}/")}
