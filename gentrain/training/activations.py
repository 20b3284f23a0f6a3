"""What the losses of a run keep in memory, found by running them on tensors that have shapes and no numbers (torch's FakeTensorMode)."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gentrain.config import ConfigError
from gentrain.data.latents import DEVIATION
from gentrain.data.loader import Loader
from gentrain.methods.base import Batch, Clock, Loss, LossFunction, Trained, Update, condition_of
from gentrain.models.adapters import Base, OnBase
from gentrain.models.base import Codec
from gentrain.noise import Noise
from gentrain.training.blocks import recompute
from gentrain.training.compatibility import warn_of_fast_times
from gentrain.training.engine import as_read, frozen
from gentrain.training.roles import RoleNets, build_network, learning_below, network_above, place_of
from gentrain.training.run import RunConfig
from gentrain.training.world import RankGroup
from gentrain.training.zero import WHOLE

log = logging.getLogger(__name__)

_STEPS = 64  # of the method, over which its updates are looked for


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch of the dearest update of a role.

    saved: kept for the backward as the loss ends, weights aside. peak: the most that is there at once beside weights and their gradients,
    `saved` included. weights: network -> those of its weights that are kept for the backward, which matters where they are gathered from
    other ranks. assumed: what stands for the method's own loss where that could not be run, and why; "" where it could.
    """

    saved: int
    peak: int
    weights: dict[str, int]
    assumed: str = ""


class SavedTensors:
    """Within it, what autograd keeps for backwards is counted once per storage, as long as it is kept.

    Args:
        known: storages that are not counted: what is there in any case.
    """

    def __init__(self, known: set[int]):
        self._known, self._kept = known, weakref.WeakSet[_Kept]()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        self._kept.add(kept)
        return kept

    def storages(self) -> dict[int, int]:
        """Storage -> bytes, of all that is kept now."""
        return {storage_of(kept.tensor): kept.tensor.untyped_storage().nbytes() for kept in self._kept}

    def bytes(self) -> int:
        return sum(size for storage, size in self.storages().items() if storage not in self._known)


class _Kept:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def storage_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common, while they live."""
    return tensor.untyped_storage()._cdata


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, as long as they live.

    What comes of no fake tensor is computed: data, noise, times and steps have their numbers until they meet a network.
    """

    def __init__(self, known: set[int]):
        super().__init__()
        self._seen, self.live, self.peak = set(known), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(value, FakeTensor) for value in tree_leaves((args, kwargs))):
            output = func(*args, **kwargs)
        else:
            with unset_fake_temporarily():
                output = func(*args, **kwargs)
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and storage_of(value) not in self._seen:
                storage = value.untyped_storage()
                self._seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return output

    def _freed(self, storage: int, size: int) -> None:
        self._seen.discard(storage)
        self.live -= size


class Networks:
    """Every role's network without numbers, sharing what `Roles` shares.

    Attributes:
        modules: role -> network, an `OnBase` for one that learns a part of it.
        held: what is there once -> its parameters: of each role that has some of its own, and of each network "below" several.
        below: name of such a network -> the roles that share it.
    """

    def __init__(self, run: RunConfig):
        self.run = run
        self.modules: dict[str, nn.Module] = {}
        self.held: dict[str, list[nn.Parameter]] = {}
        above = [role for role in run.method.roles if run.part_of(role) is not None]
        places = {role: place_of(run, role) for role in run.method.roles}
        live = {role: other for role in above if (other := learning_below(run, role)) is not None}
        shared = {places[role] for role in above if role not in live}
        alike = [role for role in run.method.roles if places[role] in shared and role not in live]
        sharing = [role for role in alike if role in above or not trains(run, role)]
        self.below = {f"below {', '.join(found)}": found for found in _grouped(sharing, places)}
        self._bases: dict[str, Base] = {}
        with torch.device("meta"):
            for roles in self.below.values():
                self._bases |= dict.fromkeys(roles, Base(build_network(run, roles[0])))
            for role in run.method.roles:
                if role in above:
                    base = Base(self.modules[live[role]], live=True) if role in live else self._bases[role]
                    self.modules[role] = network_above(run, role, base)
                else:
                    self.modules[role] = self._bases[role].network if role in self._bases else build_network(run, role)
                    if run.training.recompute and trains(run, role):
                        recompute(self.modules[role])

    def fake(self) -> None:
        """From the meta device to fake tensors of the mode that is on."""
        run = self.run
        for name, roles in self.below.items():
            base = _faked(self._bases[roles[0]].network, run.engine_of(roles[0]).live_dtype).eval().requires_grad_(False)
            self.held[name] = list(base.parameters())
        for role, module in self.modules.items():
            if role not in self._bases or isinstance(module, OnBase):
                _faked(module, run.engine_of(role).live_dtype).train(trains(run, role)).requires_grad_(trains(run, role))
                self.held[role] = list(module.parameters())

    def nets(self, codec: Codec) -> Any:
        networks: dict[str, Any] = {}
        for role in self.run.method.roles:
            networks[role] = self.run.seen(role, self._call(role))
        return RoleNets(RankGroup(1), codec.decode, networks)

    def _call(self, role: str) -> Callable[..., Tensor]:
        engine, module = self.run.engine_of(role), self.modules[role]
        autocast = trains(self.run, role) and engine.precision == "bf16" and engine.live_dtype == torch.float32

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output: Tensor = module(as_read(x, engine.live_dtype), *args, **kwargs)
            return output.float()

        return call


def _faked(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with its parameters and buffers, on the meta device, replaced by fake ones."""
    made: dict[int, Tensor | None] = {id(None): None}
    for each in module.modules():
        for store in (each._parameters, each._buffers):
            for name, value in store.items():
                if value is not None and id(value) not in made:
                    fake = torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype)
                    made[id(value)] = nn.Parameter(fake) if isinstance(value, nn.Parameter) else fake
                store[name] = made[id(value)]  # type: ignore[assignment]
    return module


def updates_of(run: RunConfig) -> dict[str, list[tuple[LossFunction, ...]]]:
    """Role -> the losses of each of its updates, over the first steps and the last."""
    batch = run.training.batch_size
    total = max(run.training.samples // batch, 1)
    found: dict[str, dict[tuple[str, ...], tuple[LossFunction, ...]]] = {}
    for step in sorted({*range(min(_STEPS, total)), total - 1}):
        for update in run.method.updates(Clock(step * batch, batch, total * batch)):
            if isinstance(update, Update):
                key = tuple(getattr(loss, "__qualname__", type(loss).__name__) for loss in update.losses)
                found.setdefault(update.role, {}).setdefault(key, update.losses)
    return {role: list(losses.values()) for role, losses in found.items()}


def _grouped(roles: list[str], places: dict[str, str]) -> list[list[str]]:
    return [[role for role in roles if places[role] == place] for place in dict.fromkeys(places[role] for role in roles)]


@dataclass(frozen=True)
class Measured:
    """What a run makes one process keep of micro-batches of some size.

    held, below: see `Networks`. codec: component -> bytes of its parameters. activations: role that learns -> of its dearest update.
    losses: such a role -> how many of them an update has at most.
    """

    held: dict[str, list[nn.Parameter]]
    below: dict[str, list[str]]
    codec: dict[str, int]
    activations: dict[str, Activations]
    losses: dict[str, int]


def measure(run: RunConfig, rows: int) -> Measured:
    """What micro-batches of `rows` make the run keep. Nothing is computed, and no weights are made.

    Raises ConfigError when a network does not fit the data.
    """
    run.fit_space()
    run.check_space()
    warn_of_fast_times(run)
    batch = _first_batch(run, rows)
    codec: Any = run.codec()
    skeletons = {} if DEVIATION in batch else codec.skeletons()  # of a cache nothing is encoded
    batch = codec.shaped(batch)
    for name in run.method.pools():  # as many rows of each
        seen = {key: value for key, value in batch.items() if key in ("x", "label") or key.startswith("condition/")}
        batch |= {f"{name}/{key}": value for key, value in seen.items()}
    sizes = {name: sum(4 * p.numel() for p in module.parameters()) for name, module in skeletons.items()}
    networks = Networks(run)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        networks.fake()
        if "vae" in skeletons:  # which a loss may decode with
            vars(codec)["_vae"] = _faked(skeletons["vae"], torch.float32).eval().requires_grad_(False)
        found, losses = {}, {}
        for role, updates in updates_of(run).items():
            losses[role] = max(map(len, updates))
            each = [_measure(networks, codec, role, loss, batch) for update in updates for loss in update]
            found[role] = max(each, key=lambda activations: activations.peak)
    return Measured(networks.held, networks.below, sizes, found, losses)


def _measure(networks: Networks, codec: Codec, role: str, loss: LossFunction, batch: Batch) -> Activations:
    try:
        return _run(networks, codec, role, loss, batch)
    except Exception as error:  # a loss that looks at numbers, an operation without a fake: whatever it is, something must stand for it
        log.debug("the loss %s on fake tensors", loss, exc_info=True)
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    denoises, condition = networks.run.method.roles[role].denoiser, condition_of(batch)

    def forward(nets: Any, batch: Batch, noise: Noise) -> Loss:
        network, t = getattr(nets, role), torch.rand(len(batch["x"]))
        if networks.run.method.roles[role].classifier:
            return Loss(network(batch["x"]).square().mean())
        return Loss((network.raw if denoises else network)(batch["x"], t, condition).square().mean())

    try:
        found = _run(networks, codec, role, forward, batch)
    except Exception:  # a network of another kind
        return Activations(0, 0, dict.fromkeys(networks.held, 0), f"not known ({why})")
    return replace(found, assumed=f"of one forward and backward of its network alone ({why})")


def _run(networks: Networks, codec: Codec, role: str, loss: LossFunction, batch: Batch) -> Activations:
    """One forward and backward of the loss, in which only `role` learns."""
    run, module = networks.run, networks.modules[role]
    known = {storage_of(value) for each in networks.modules.values() for value in _tensors(each)} | set(map(storage_of, batch.values()))
    hooks = [p.register_post_accumulate_grad_hook(_drop) for p in module.parameters()]
    module.train(run.method.dropout)
    try:
        with ExitStack() as stack:
            for name, each in networks.modules.items():
                if name != role and trains(run, name):
                    stack.enter_context(frozen(each))
            live, saved = stack.enter_context(LiveTensors(known)), stack.enter_context(SavedTensors(known))
            value = loss(networks.nets(codec), batch, Noise(0, batch["index"])).value
            kept = saved.storages()
            weights = {name: sum(kept.get(storage_of(p), 0) for p in own if p.numel() > WHOLE) for name, own in networks.held.items()}
            total = saved.bytes()
            value.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return Activations(total, max(live.peak, total), weights)


def trains(run: RunConfig, role: str) -> bool:
    return isinstance(run.method.roles[role], Trained)


def _drop(p: Tensor) -> None:
    p.grad = None  # gradients of weights are counted where engines keep them


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    inner = module.base.network if isinstance(module, OnBase) else module
    for each in {module, inner}:
        yield from each.parameters()
        yield from each.buffers()


def _first_batch(run: RunConfig, rows: int) -> Batch:
    """Rows of the data set, for their keys, shapes and types."""
    try:
        batch: Batch = next(iter(Loader(run.data.split("train"), run.seed, rows, 0, 1)))[0]
    except (OSError, ValueError) as error:
        raise ConfigError(str(error), source=run.output, key="data") from error
    return run.data.augment(batch, Noise(0, batch["index"]))
