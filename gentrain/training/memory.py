"""How much memory one process of a run needs, of what, and what to change where that is too much. Nothing is started or allocated."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from gentrain.config import ConfigError
from gentrain.methods.base import Trained
from gentrain.models.adapters import Adapter
from gentrain.training.activations import Activations, Measured, measure
from gentrain.training.engine import Engine, Held
from gentrain.training.run import RunConfig
from gentrain.training.zero import DeepSpeedEngine, sharded_bytes

GIB = 2**30


@dataclass(frozen=True)
class Part:
    """Bytes of a role, of a network that several share, or of a part of the codec, on one process.

    held: of a role that learns, what its engine does. weights: of anything else. activations: of its dearest update, with `gathered`, the
    weights that ZeRO-3 brings together for it.
    """

    name: str
    weights: int = 0
    held: Held | None = None
    averaged: bool = False
    activations: Activations | None = None
    gathered: int = 0

    @property
    def resting(self) -> int:
        """All the time."""
        if self.held is None:
            return self.weights
        return self.held.weights + self.held.buffers + (self._stepped if self.held.host is None else 0)

    @property
    def host(self) -> int:
        """Beside it on the host, all the time."""
        return 0 if self.held is None or self.held.host is None else self.held.host + self._stepped

    @property
    def _stepped(self) -> int:
        """What lies where the steps are made."""
        assert self.held is not None
        return self.held.optimizer + (self.held.average if self.averaged else 0)

    @property
    def learning(self) -> int:
        """More, while the role learns."""
        if self.held is None or self.activations is None:
            return 0
        return self.held.gradients + max(self.held.passing + self.activations.peak + self.gathered, self.held.stepping)


@dataclass(frozen=True)
class Memory:
    """Of one process of a run; `host` bytes lie beside it on the host."""

    parts: tuple[Part, ...]
    host: int = 0

    @property
    def resting(self) -> int:
        return sum(part.resting for part in self.parts)

    @property
    def peak(self) -> int:
        """Bytes on the device at the most: all that rests there, and the dearest update."""
        return self.resting + max(part.learning for part in self.parts)

    @property
    def dearest(self) -> str:
        """The role whose update needs the most."""
        return max(self.parts, key=lambda part: part.learning).name


@dataclass
class Planner:
    """Plans runs that differ little from one another; what they have in common is measured once."""

    _measured: dict[str, Measured] = field(default_factory=dict)

    def memory(self, run: RunConfig) -> Memory:
        """Raises ConfigError when a network does not fit its data."""
        rows = run.training.batch_size // (run.training.micro_batches * run.cluster.most)
        matters = {
            role: (run.engine_of(role).precision, run.engine_of(role).live_dtype, run.part_of(role), run.role_settings(role).placement)
            for role in run.method.roles
        }
        key = repr((rows, matters))
        if key not in self._measured:
            self._measured[key] = measure(run, rows)
        return _memory(run, self._measured[key])

    def alternatives(self, run: RunConfig) -> dict[str, Memory]:
        """What to change -> what the run needs then: at each ZeRO stage, optimisers on the host, in bf16, with or without adapter."""
        options = [*_stages(run, range(4)), *_offloads(run), *_precisions(run), *_adapters(run)]
        return {told: memory for told, changed in options if (memory := self._possible(changed)) is not None}

    def remedy(self, run: RunConfig, limit: int) -> tuple[list[str], Memory]:
        """What to change so that the run fits into `limit` bytes, as overrides, and what it needs then.

        The first single change in the order of `_CHANGES` that is enough; else as many of them together as it takes, or all of them, and
        then the memory may still be above the limit.
        """
        for change in _CHANGES:
            for told, changed in change(run):
                memory = self._possible(changed)
                if memory is not None and memory.peak <= limit:
                    return [told], memory
        together: list[str] = []
        least = self.memory(run)
        for change in _CHANGES:
            told, changed = ([("", run), *change(run)])[-1]
            memory = self._possible(changed) if least.peak > limit else None
            if memory is not None and memory.peak < least.peak:
                run, least = changed, memory
                together.append(told)
        return together, least

    def _possible(self, run: RunConfig) -> Memory | None:
        try:
            return self.memory(run)
        except ConfigError:  # an adapter whose layers the network has not
            return None


def memory_of(run: RunConfig) -> Memory:
    """What one process of the run needs. Raises ConfigError when a network does not fit its data."""
    return Planner().memory(run)


def _memory(run: RunConfig, measured: Measured) -> Memory:
    parts, host, ranks = [], 0, run.cluster.most
    for name, parameters in measured.held.items():
        role = measured.below.get(name, [name])[0]
        part, placement = run.method.roles[role], run.role_settings(role).placement
        if name == role and isinstance(part, Trained):
            activations = measured.activations.get(role)
            passes = run.training.micro_batches * measured.losses.get(role, 1)
            held = run.engine_of(role).held(parameters, run.optimizer_of(role), ranks, passes)
            held = replace(held, average=held.average * (1 + len(run.training.power_ema)))
            gathered = _gathered(run, measured, activations) if activations is not None else 0
            parts.append(Part(name, held=held, averaged=part.ema, activations=activations, gathered=gathered))
        elif placement == "offloaded":
            host += _bytes(run, role, parameters)
            parts.append(Part(name))
        else:
            shared = sharded_bytes(parameters, run.engine_of(role).live_dtype.itemsize, ranks)
            parts.append(Part(name, shared if placement == "sharded" else _bytes(run, role, parameters)))
    parts += [Part(name, size) for name, size in measured.codec.items()]
    return Memory(tuple(parts), host + sum(part.host for part in parts))


def _bytes(run: RunConfig, role: str, parameters: list[nn.Parameter]) -> int:
    return run.engine_of(role).live_dtype.itemsize * sum(p.numel() for p in parameters)


def _gathered(run: RunConfig, measured: Measured, activations: Activations) -> int:
    """Weights that an update brings to the device: of what lies on the host all, of what ranks share what is kept for the backward."""
    total = 0
    shares = run.cluster.most > 1
    for name, parameters in measured.held.items():
        role = measured.below.get(name, [name])[0]
        engine, placement = run.engine_of(role), run.role_settings(role).placement
        if placement == "offloaded":
            total += _bytes(run, role, parameters)
        elif shares and (
            placement == "sharded" if name != role or not isinstance(run.method.roles[role], Trained) else _stage(engine) == 3
        ):
            total += activations.weights[name]
    return total


# --- what may be changed -------------------------------------------------------------------------------------------------------

Changes = Iterator[tuple[str, RunConfig]]  # what to change, as overrides, and the run with it


def _stage(engine: Engine) -> int:
    return engine.zero_stage if isinstance(engine, DeepSpeedEngine) else -1


def _with_engines(run: RunConfig, change: Callable[[Engine], Engine]) -> RunConfig:
    changed = copy.copy(run)
    changed.engine = change(run.engine)
    changed.roles = {
        name: replace(settings, engine=change(settings.engine)) if settings.engine is not None else settings
        for name, settings in run.roles.items()
    }
    return changed


def _micro_batches(run: RunConfig) -> Changes:
    training, workers = run.training, math.lcm(*range(run.cluster.fewest, run.cluster.most + 1))
    for portions in range(training.micro_batches + 1, training.batch_size // run.cluster.most + 1):
        if training.batch_size % (portions * workers) == 0:
            changed = copy.copy(run)
            changed.training = replace(training, micro_batches=portions)
            yield f"training.micro_batches={portions}", changed


def _stages(run: RunConfig, stages: Iterable[int] = ()) -> Changes:
    """Those above the run's own, or `stages`; where they are allowed."""
    learning = [role for role, part in run.method.roles.items() if isinstance(part, Trained)]
    lowest = min(_stage(run.engine_of(role)) for role in learning)
    higher = range(lowest + 1, 4) if run.cluster.most > 1 else range(min(lowest, 1))  # one process has nobody to share with
    for stage in stages or higher:

        def at(engine: Engine, stage: int = stage) -> Engine:
            if isinstance(engine, DeepSpeedEngine):
                return replace(engine, zero_stage=stage)  # type: ignore[arg-type]
            return DeepSpeedEngine(zero_stage=stage, precision=engine.precision)  # type: ignore[arg-type]

        try:
            changed = _with_engines(run, at)
        except ConfigError:  # stage 0 has no bf16
            continue
        if _allowed(changed):
            written = f"engine.zero_stage={stage}"
            if lowest < 0:
                written = f"engine={{name: deepspeed, zero_stage: {stage}, precision: {changed.engine.precision}}}"
            yield written, changed


def _allowed(run: RunConfig) -> bool:
    """Whether its engines change neither what an optimiser does nor whether derivatives pass."""
    learning = [role for role, part in run.method.roles.items() if isinstance(part, Trained)]
    sharded = all(run.optimizer_of(role).needs in run.engine_of(role).shows for role in learning)
    return sharded and all(run.engine_of(role).forward_mode for role in run.method.forward_mode)


def _placements(run: RunConfig) -> Changes:
    """Weights that never change, shared out over the ranks."""
    frozen = [role for role, part in run.method.roles.items() if not isinstance(part, Trained) or isinstance(run.part_of(role), Adapter)]
    if run.cluster.most > 1 and any(run.role_settings(role).placement == "plain" for role in frozen):
        changed = copy.copy(run)
        changed.roles = run.roles | {role: replace(run.role_settings(role), placement="sharded") for role in frozen}
        yield " ".join(f"roles.{role}.placement=sharded" for role in frozen), changed


def _offloads(run: RunConfig) -> Changes:
    """Optimisers on the host, at the stages that the run has, or at the first that can."""

    def offloaded(engine: Engine) -> Engine:
        if isinstance(engine, DeepSpeedEngine):
            return replace(engine, zero_stage=max(engine.zero_stage, 1), offload_optimizer=True)
        return DeepSpeedEngine(zero_stage=1, precision=engine.precision, offload_optimizer=True)

    engines = [run.engine_of(role) for role, part in run.method.roles.items() if isinstance(part, Trained)]
    if all(isinstance(engine, DeepSpeedEngine) and engine.offload_optimizer for engine in engines):
        return
    changed = _with_engines(run, offloaded)
    if _allowed(changed):
        written = "engine.offload_optimizer=true"
        if min(map(_stage, engines)) < 1:
            written = f"engine={{name: deepspeed, zero_stage: 1, precision: {run.engine.precision}, offload_optimizer: true}}"
        yield written, changed


def _precisions(run: RunConfig) -> Changes:
    if run.engine.precision == "fp32" and _stage(run.engine) != 0:
        yield "engine.precision=bf16", _with_engines(run, lambda engine: replace(engine, precision="bf16"))  # type: ignore[type-var]


def _adapters(run: RunConfig) -> Changes:
    """For a run whose roles start from weights that know something; the other way round where it has one."""
    learning = [role for role, part in run.method.roles.items() if isinstance(part, Trained)]
    changed = copy.copy(run)
    named = [key for key in ("adapter", "trainable") if _names(run, key)]
    if named:
        changed.adapter = changed.trainable = None
        changed.roles = {name: replace(settings, adapter=None, trainable=None) for name, settings in run.roles.items()}
        yield " ".join(f"{key}=null" for key in named), changed
    elif all(_knows(run, role) and run.part_of(role) is None for role in learning):
        changed.adapter = Adapter(rank=16)
        yield "adapter={rank: 16}", changed


def _names(run: RunConfig, key: str) -> bool:
    return any(getattr(each, key) is not None for each in (run, *run.roles.values()))


def _knows(run: RunConfig, role: str) -> bool:
    copied = run.method.roles[role].init
    own = run.role_settings(role).weights is not None or run.model_of(role).law() is not None
    return own or (copied is not None and _knows(run, copied))


# Those that leave the numbers as they are come first, then arithmetic, then what is learnt at all.
_CHANGES: tuple[Callable[[RunConfig], Changes], ...] = (_micro_batches, _stages, _placements, _offloads, _precisions, _adapters)
