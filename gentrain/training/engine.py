"""What holds a network that learns: forward, backward, step, averages, and its state by parameter name.

`RoleEngine` is the contract and does everything but the parallelism; `torch_engine.py` has the reference implementation, `zero.py`
DeepSpeed's. Both give the same loss curve in a test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gentrain.config import Component
from gentrain.training.checkpoint import OWN, Piece, Shard, Shards
from gentrain.training.optimizers import Averaging, Optimizer, Partition
from gentrain.training.world import World

Precision = Literal["fp32", "bf16"]
State = dict[str, Tensor]


class EngineMisuse(RuntimeError):
    """A use of an engine that would train something else than the method says. The message names the role and the remedy."""


@dataclass(frozen=True)
class Fragment:
    """A stretch of a parameter and where this rank keeps it: parameter[start:start + size] is partition[offset:offset + size]."""

    name: str
    start: int
    size: int
    partition: int
    offset: int


@dataclass(frozen=True)
class StepResult:
    """grad_norm: of all parameters over all ranks, before clipping. applied: False when it was not finite and the step was skipped."""

    grad_norm: float
    applied: bool


class RoleEngine:
    """One learning role on one rank.

    Subclasses set `partitions` (this rank's float32 master weights, flat or shaped), `fragments` and `optimizer` (torch's, whose state is
    keyed by the partitions), and implement `_forward`, `_through`, `_backward` and `_step`.
    """

    partitions: list[Tensor]
    fragments: list[Fragment]
    optimizer: torch.optim.Optimizer
    sharded: bool  # whether ranks hold different partitions

    def __init__(self, role: str, module: nn.Module, world: World, gradient_clipping: float | None):
        self.role, self.module, self.world, self.clipping = role, module, world, gradient_clipping
        self.shapes = {name: p.shape for name, p in module.named_parameters()}
        self.ema: list[Tensor] | None = None
        self.powers: list[list[Tensor]] = []
        self._forwards = 0
        self._complete = False  # whether all gradients of the next step are there

    # --- the step ---

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The network's forward, float32, whose output the next `backward` may reach."""
        if torch.is_grad_enabled():
            self._forwards += 1
        return self._forward(x, *args, **kwargs).float()

    def through(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The network's output, float32, inside another role's loss: gradients reach `x`, never the weights (see `frozen`)."""
        return self._through(x, *args, **kwargs).float()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of `loss`; `last` before the step. Raises EngineMisuse where the result would be silently wrong."""
        if not loss.requires_grad:
            raise EngineMisuse(
                f"the loss of role {self.role!r} does not depend on its weights: call nets.{self.role} with gradients enabled in this loss"
            )
        if self._forwards == 0:
            raise EngineMisuse(
                f"a backward of role {self.role!r} without a new forward of it: compute the network's output inside each loss, or sum the "
                "losses that share it (gradients of a second backward are dropped or doubled by sharded engines)"
            )
        if self._complete:
            raise EngineMisuse(f"a backward of role {self.role!r} after its last one: step first (gradients would be averaged twice)")
        self._forwards = 0
        self._backward(loss, last)
        self._complete = last

    def step(self, lr: float, *others: float) -> StepResult:
        """One optimiser step at learning rate `lr`, skipped on all ranks alike when the gradient is not finite.

        Args:
            others: those of the parameters in each of the configuration's groups.
        """
        if not self._complete:
            raise EngineMisuse(f"a step of role {self.role!r} without a last backward: pass last=True to the final one")
        self._complete = False
        for group in self.optimizer.param_groups:
            group["lr"] = (lr, *others)[group.get("number", 0)]
        return self._step()

    def update_ema(self, decay: float) -> None:
        """ema <- decay * ema + (1 - decay) * master weights, on this rank's partitions, without communication.

        Of an optimiser that averages: ema <- its average.
        """
        if self.ema is None:
            raise EngineMisuse(f"role {self.role!r} keeps no average")
        with torch.no_grad():
            if isinstance(self.optimizer, Averaging):
                torch._foreach_copy_(self.ema, [self.optimizer.average(p) for p in self.partitions])
                return
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.partitions], 1 - decay)

    def update_powers(self, decays: list[float]) -> None:
        """As `update_ema`, of the averages that `start_ema` began beside it."""
        with torch.no_grad():
            for average, decay in zip(self.powers, decays, strict=True):
                torch._foreach_lerp_(average, [p.detach() for p in self.partitions], 1 - decay)

    def follow(self, other: RoleEngine, decay: float) -> None:
        """Weights <- decay * weights + (1 - decay) * other's, on this rank's masters. Raises EngineMisuse for an engine of another kind."""
        if self.fragments != other.fragments:
            raise EngineMisuse(f"role {self.role!r} follows {other.role!r}, whose engine is another; give both roles the same `engine:`")
        torch._foreach_lerp_([p.detach() for p in self.partitions], [p.detach() for p in other.partitions], 1 - decay)
        self._refresh()

    def start_ema(self, powers: int = 0) -> None:
        """Starts from the master weights themselves (under bf16 they are not the weights the module was built with).

        Args:
            powers: how many more averages there are, `powers`: see training.averages.
        """
        self.ema = [p.detach().clone() for p in self.partitions]
        self.powers = [[p.detach().clone() for p in self.partitions] for _ in range(powers)]

    # --- what all ranks hold, whole: collective ---

    def weights(self) -> State:
        """Full float32 master weights and the module's buffers, on every rank, on the host."""
        return self._assemble([p.detach() for p in self.partitions]) | self._buffers()

    def ema_weights(self) -> State:
        """Full average, with the module's buffers as they are now."""
        if self.ema is None:
            raise EngineMisuse(f"role {self.role!r} keeps no average")
        return self._assemble(self.ema) | self._buffers()

    def _buffers(self) -> State:
        return {name: v.detach().cpu().clone() for name, v in self.module.state_dict().items() if name not in self.shapes}

    def _assemble(self, partitions: list[Tensor]) -> State:
        full = {name: torch.zeros(shape.numel(), dtype=torch.float32) for name, shape in self.shapes.items()}
        for f in self.fragments:
            full[f.name][f.start : f.start + f.size] = _stretch(partitions, f).cpu()
        if self.sharded and self.world.size > 1:
            for value in full.values():  # exactly one rank holds each element, so the sum is exact
                dist.all_reduce(value)
        return {name: value.reshape(self.shapes[name]) for name, value in full.items()}

    # --- what this rank holds, to be saved and restored ---

    def shards(self) -> Iterator[tuple[str, Shard]]:
        """This rank's part of the state: `weights` and `ema`, with the module's buffers, `power<n>` and `optimizer`. Views where
        they are on the host.

        Over all ranks each element of a parameter is there once. Buffers, and numbers that all parameters share, are in every part.
        """
        buffers = {name: Piece(v.reshape(-1), 0, tuple(v.shape)) for name, v in self._buffers().items()}
        yield "weights", self._pieces(self.partitions) | buffers
        if self.ema is not None:
            yield "ema", self._pieces(self.ema) | buffers
        for number, average in enumerate(self.powers):
            yield f"power{number}", self._pieces(average)
        entries = [self.optimizer.state.get(p, {}) for p in self.partitions]
        optimizer: Shard = {}
        for key in sorted({key for entry in entries for key in entry}):
            held = {i: torch.as_tensor(entry[key]) for i, entry in enumerate(entries) if key in entry}
            values, everywhere = list(held.values()), len(held) == len(entries)
            if everywhere and all(value.shape == p.shape for value, p in zip(values, self.partitions, strict=True)):
                optimizer |= self._pieces(values, f"{key}/")
            elif everywhere and all(value.numel() == 1 for value in values) and len({value.item() for value in values}) == 1:
                optimizer[key] = Piece(values[0].reshape(1), 0, ())
            elif not self.sharded:
                own = ((f, held[f.partition]) for f in self._dealt if f.partition in held)
                optimizer |= {f"{OWN}{key}/{f.name}": Piece(value.reshape(-1), 0, tuple(value.shape)) for f, value in own}
            else:
                raise EngineMisuse(
                    f"role {self.role!r}: the optimiser's {key!r} is neither of a parameter's shape nor a number of all of them"
                )
        yield "optimizer", optimizer

    def read(self, shards: Callable[[str], Shards]) -> None:
        """Fills this rank's part of the state, as any number of ranks wrote it; `refresh` must follow. Raises CheckpointError.

        Args:
            shards: kind -> where its tensors are.
        """
        with torch.no_grad():
            weights, optimizer = shards("weights"), shards("optimizer")
            self._fill(self.partitions, weights)
            saved = self._buffers()
            for name, buffer in self.module.named_buffers():
                if name in saved:
                    buffer.copy_(weights.read(name, 0, buffer.numel(), tuple(buffer.shape)).reshape(buffer.shape))
            if self.ema is not None:
                self._fill(self.ema, shards("ema"))
            for number, average in enumerate(self.powers):
                self._fill(average, shards(f"power{number}"))
            for key, per_parameter in optimizer.keys().items():
                if per_parameter:
                    values = [torch.zeros_like(p) for p in self.partitions]
                    self._fill(values, optimizer, f"{key}/")
                else:
                    values = [optimizer.read(key, 0, 1, ()).reshape(()).clone() for _ in self.partitions]
                    if any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups):
                        values = [value.to(p.device) for value, p in zip(values, self.partitions, strict=True)]
                for partition, value in zip(self.partitions, values, strict=True):
                    self.optimizer.state[partition][key] = value
            if not self.sharded:  # what else an optimiser keeps of whole tensors
                parameters = dict(zip(self.shapes, self.partitions, strict=True))
                for name, value in optimizer.whole(OWN).items():
                    key, _, of = name.removeprefix(OWN).partition("/")
                    if of not in parameters:
                        raise optimizer.foreign(name)
                    self.optimizer.state[parameters[of]][key] = value.to(parameters[of].device)

    def refresh(self) -> None:
        """Has the weights that forward uses follow the masters. Collective. Raises EngineMisuse if they do not."""
        self._refresh()
        for f in self.fragments:
            master = _stretch(self.partitions, f).detach()
            if not all(torch.equal(live, master.to(live)) for live in self._live(f)):
                raise EngineMisuse(f"role {self.role!r}: the weights {f.name!r} that forward uses are not the ones that were restored")

    def _pieces(self, partitions: list[Tensor], prefix: str = "") -> Shard:
        return {prefix + f.name: Piece(_stretch(partitions, f).detach(), f.start, tuple(self.shapes[f.name])) for f in self._dealt}

    @property
    def _dealt(self) -> list[Fragment]:
        """Those that this rank writes: what every rank holds is dealt out, so that each writes a share of it."""
        return self.fragments if self.sharded else self.fragments[self.world.rank :: self.world.size]

    def _fill(self, partitions: list[Tensor], shards: Shards, prefix: str = "") -> None:
        for f in self.fragments:
            _stretch(partitions, f).copy_(shards.read(prefix + f.name, f.start, f.size, tuple(self.shapes[f.name])))

    # --- what the parallelism decides ---

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def _through(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def _backward(self, loss: Tensor, last: bool) -> None:
        raise NotImplementedError

    def _step(self) -> StepResult:
        raise NotImplementedError

    def _refresh(self) -> None:
        """Copies the masters into the weights that forward uses. Collective."""
        raise NotImplementedError

    def _live(self, fragment: Fragment) -> list[Tensor]:
        """The fragment's stretch, flat, of every copy of the weights that forward may use here."""
        raise NotImplementedError


def _stretch(partitions: list[Tensor], f: Fragment) -> Tensor:
    return partitions[f.partition].view(-1)[f.offset : f.offset + f.size]


def as_read(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a network of weights of `dtype` is given: x in that, unless it is of whole numbers."""
    return x.to(dtype) if x.is_floating_point() else x


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within it no parameter of `module` gathers a gradient and layers behave as in evaluation."""
    training, trainable = module.training, [p for p in module.parameters() if p.requires_grad]
    module.eval()
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
        module.train(training)


@dataclass(frozen=True)
class Held:
    """Bytes that an engine holds on one rank for one role, the most on any rank.

    weights: those that forward uses and the float32 masters, with padding. optimizer: its state once it has stepped. average: what
    `start_ema` adds. buffers: of communication, there all the time. gradients: as a step begins. passing: more, while gradients are made.
    stepping: more, while the step runs. host: None, or what lies on the host beside `optimizer` and `average`, which are there too then.
    """

    weights: int
    optimizer: int
    average: int
    buffers: int
    gradients: int
    passing: int
    stepping: int = 0
    host: int | None = None


def replicated(parameters: list[nn.Parameter], optimizer: Optimizer) -> tuple[int, int]:
    """Bytes of the parameters in float32 and of the optimiser's state of them."""
    weights = state = 0
    for p in parameters:
        each, once = optimizer.state_bytes(tuple(p.shape))
        weights, state = weights + 4 * p.numel(), state + round(each * p.numel()) + once
    return weights, state


class Engine(Component, kind="engine"):
    """An engine as configured."""

    precision: Precision

    @property
    def forward_mode(self) -> bool:
        return True  # whether derivatives in forward mode (jvp) pass through it

    @property
    def shows(self) -> frozenset[Partition]:
        """What an optimiser can see of a parameter under this engine: it must contain the optimiser's `needs`."""
        raise NotImplementedError

    @property
    def live_dtype(self) -> torch.dtype:
        """Of the weights that forward uses."""
        raise NotImplementedError

    def build(self, role: str, module: nn.Module, optimizer: Optimizer, world: World) -> RoleEngine:
        """An engine around a module that holds its initial weights, in `live_dtype`, on the world's device."""
        raise NotImplementedError

    def held(self, parameters: list[nn.Parameter], optimizer: Optimizer, ranks: int, passes: int) -> Held:
        """What `build` makes one of `ranks` hold for a module with these parameters, which may be on the meta device.

        Args:
            passes: backwards before each step.
        """
        raise NotImplementedError


class ReplicatedEngine(RoleEngine):
    """Every rank holds every parameter: the partitions are the parameters themselves."""

    sharded = False

    def __init__(self, role: str, module: nn.Module, optimizer: torch.optim.Optimizer, world: World, gradient_clipping: float | None):
        super().__init__(role, module, world, gradient_clipping)
        self.optimizer = optimizer
        self.partitions = [p for _, p in module.named_parameters()]
        self.fragments = [Fragment(name, 0, p.numel(), i, 0) for i, (name, p) in enumerate(module.named_parameters())]

    def _refresh(self) -> None:
        pass  # the partitions are what forward uses

    def _live(self, fragment: Fragment) -> list[Tensor]:
        return []

    def clip(self) -> StepResult:
        """Clips the averaged gradients, which are alike on all ranks; so is the verdict on whether they are finite."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        value = norm.item()
        finite = math.isfinite(value)
        if finite and self.clipping is not None:
            torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), self.clipping, norm)
        return StepResult(value, finite)
