"""The networks of a run: built, given their first weights, and shown to each loss with only one of them learning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gentrain.config import ConfigError
from gentrain.methods.base import Nets, Trained
from gentrain.models.base import Model
from gentrain.models.denoiser import Denoiser
from gentrain.noise import derive
from gentrain.training.checkpoint import Checkpoint
from gentrain.training.engine import RoleEngine, State, frozen
from gentrain.training.run import RunConfig, open_run
from gentrain.training.saving import together
from gentrain.training.world import RankGroup, World
from gentrain.training.zero import shard_frozen


class _Nets:
    """See methods.base.Nets."""

    def __init__(self, group: RankGroup, networks: dict[str, Any]):
        self.group = group
        self.__dict__.update(networks)

    def __getattr__(self, role: str) -> Any:
        raise AttributeError(f"the method has no role {role!r}; its roles: {', '.join(name for name in self.__dict__ if name != 'group')}")


class Roles:
    """Every role's network: an engine for those that learn, a plain frozen module for the others.

    Args:
        resume: a checkpoint to continue from, None for a fresh start.
    """

    def __init__(self, run: RunConfig, world: World, resume: Checkpoint | None = None):
        self.run, self.world, self.group = run, world, RankGroup(world.size)
        run.fit_space()
        self.engines: dict[str, RoleEngine] = {}
        self.frozen: dict[str, nn.Module] = {}
        for name, role in run.method.roles.items():
            module = build_network(run, name)
            if resume is None or not isinstance(role, Trained):
                _load_into(module, _first_weights(run, name, module), f"roles.{name}.weights")
            module = module.to(run.engine_of(name).live_dtype)
            if isinstance(role, Trained):
                self.engines[name] = run.engine_of(name).build(name, module.to(world.device), run.optimizer_of(name), world)
                if role.ema:
                    self.engines[name].start_ema()
            else:
                self.frozen[name] = module.eval().requires_grad_(False)
        calls = {name: self._frozen_call(name, module) for name, module in self.frozen.items()}
        self._views = {name: self._view(name, calls) for name in self.engines}
        if resume is not None:
            self.load(resume)

    def load(self, checkpoint: Checkpoint) -> None:
        """Restores every role that learns, as any number of ranks saved it. Collective. Raises CheckpointError on all ranks or on none."""

        def read() -> None:
            for name, engine in self.engines.items():
                engine.read(lambda kind, name=name: checkpoint.shards(f"{name}.{kind}", self.world.rank))  # type: ignore[misc]

        together(self.world, read, f"{checkpoint.where} cannot be restored")
        for engine in self.engines.values():
            engine.refresh()

    def _view(self, stepped: str, frozen_calls: dict[str, Callable[..., Tensor]]) -> Nets:
        """What a loss of the role `stepped` sees."""
        learning = {name: engine if name == stepped else engine.through for name, engine in self.engines.items()}
        return _Nets(self.group, {name: self.as_seen(name, call) for name, call in {**frozen_calls, **learning}.items()})

    def _frozen_call(self, name: str, module: nn.Module) -> Callable[..., Tensor]:
        """The frozen network's forward, float32, through which gradients reach its inputs, with its weights where `placement` says."""
        dtype, device = self.run.engine_of(name).live_dtype, self.world.device
        placement = self.run.role_settings(name).placement
        if placement == "sharded":
            module = shard_frozen(module.to(device))
        elif placement == "plain":
            module = module.to(device)
        self.frozen[name] = module

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if placement == "offloaded":  # the graph holds the copies until its backward, nothing holds them longer
                state = {key: value.to(device, non_blocking=True) for key, value in (*module.named_parameters(), *module.named_buffers())}
                output: Tensor = functional_call(module, state, (x.to(dtype), *args), kwargs)
            else:
                output = module(x.to(dtype), *args, **kwargs)
            return output.float()

        return call

    def as_seen(self, role: str, network: Any) -> Any:
        """The role's network as methods see it: a Denoiser, or bare."""
        return Denoiser(network, self.run.path, self.run.prediction) if self.run.method.roles[role].denoiser else network

    @contextmanager
    def stepping(self, role: str) -> Iterator[Nets]:
        """Within it only `role` learns; its losses get what this yields."""
        with ExitStack() as stack:
            for name, engine in self.engines.items():
                if name != role:
                    stack.enter_context(frozen(engine.module))
            self.engines[role].module.train()
            yield self._views[role]


def build_network(run: RunConfig, role: str) -> nn.Module:
    """The role's network with the random weights that (seed, role) give. Raises ConfigError when it does not fit the data."""
    torch.manual_seed(derive(run.seed, "weights", role))
    model, classifies = run.model_of(role), run.method.roles[role].classifier
    try:
        with torch.device("cpu"):  # sets that are held in memory may be read here, and on "meta" tensors hold no numbers
            shape, classes = run.data.shape, len(run.data.class_names)
    except ValueError as error:  # a folder of images that is not there
        raise ConfigError(str(error), source=run.output, key="data") from error
    try:
        if model.classifies != classifies:
            fit = ", ".join(name for name, other in Model.available().items() if other.classifies == classifies)
            what = "classifies" if classifies else "denoises"
            raise ValueError(f"a network that {what} is needed, and {model.registered_name} does not; there are: {fit}")
        return model.build(shape, classes)
    except ValueError as error:
        key = f"roles.{role}.model" if run.role_settings(role).model is not None else "model"
        raise ConfigError(str(error), source=run.output, key=key) from error


def count_parameters(run: RunConfig, role: str) -> int:
    """Of the role's network, without making its weights. Raises ConfigError when it does not fit the data."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_network(run, role).parameters())


def _first_weights(run: RunConfig, role: str, module: nn.Module) -> State:
    """What the role's freshly built network starts from; of a role that has gone on since, too, when a frozen one copies it."""
    settings, copied = run.role_settings(role), run.method.roles[role].init
    if settings.weights is not None:
        return load_weights(settings.weights, f"roles.{role}.weights")
    return _first_weights(run, copied, build_network(run, copied)) if copied is not None else module.state_dict()


def _load_into(module: nn.Module, weights: State, key: str) -> None:
    mine, theirs = ({name: tuple(value.shape) for name, value in state.items()} for state in (module.state_dict(), weights))
    if mine != theirs:
        name = min(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
        shapes = " and ".join(
            f"{list(where[name]) if name in where else 'absent'} in {what}" for where, what in ((theirs, "them"), (mine, "it"))
        )
        raise ConfigError(
            f"the weights are of another network: {name!r} is {shapes}; give the role the `model:` of the run they come from", key=key
        )
    module.load_state_dict(weights)


def load_weights(directory: str, key: str = "") -> State:
    """The generator's weights (or the only role's) of a run's newest checkpoint: the average where it keeps one. Raises ConfigError."""
    run = open_run(directory, key)
    names = [name for name, role in run.method.roles.items() if isinstance(role, Trained)]
    role = run.method.generator or names[0]
    storage = run.storage
    newest = storage.latest()
    if newest is None:
        raise ConfigError(f"{directory} has no checkpoint yet; train it first", key=key)
    trained = run.method.roles[role]
    with storage.open(newest) as checkpoint:
        return checkpoint.shards(f"{role}.ema" if isinstance(trained, Trained) and trained.ema else f"{role}.weights").whole()


def load_network(directory: str | Path) -> tuple[Any, RunConfig]:
    """A run's generator as a Denoiser (or its bare network, for a method without one), in evaluation mode, and its configuration.

    Raises ConfigError when the run has no checkpoint, CheckpointError when that is damaged.
    """
    run = open_run(directory)
    names = [name for name, role in run.method.roles.items() if isinstance(role, Trained)]
    role = run.method.generator or names[0]
    module = build_network(run, role)
    _load_into(module, load_weights(str(directory)), "model")
    module.eval().requires_grad_(False)
    run.fit_space()
    return Denoiser(module, run.path, run.prediction) if run.method.roles[role].denoiser else module, run
