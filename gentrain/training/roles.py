"""The networks of a run: built, given their first weights, and shown to each loss with only one of them learning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gentrain.config import ConfigError, errors_about, to_dict
from gentrain.extractors.base import Extractor
from gentrain.methods.base import Nets, Trained
from gentrain.models.adapters import Adapted, Adapter, Base, OnBase, digest_of
from gentrain.models.base import Model
from gentrain.models.control import Form
from gentrain.models.heads import FeatureCritic, Heads, feature_shapes
from gentrain.models.partial import Partial
from gentrain.noise import derive
from gentrain.training.blocks import compile_blocks, recompute
from gentrain.training.checkpoint import Checkpoint, CheckpointError
from gentrain.training.compatibility import warn_of_fast_times
from gentrain.training.engine import RoleEngine, State, as_read, frozen
from gentrain.training.given import load_into, refuse_other_law, source_of, warn_of_untrained_null
from gentrain.training.learning import dropouts, hold_the_rest, number_groups
from gentrain.training.run import RunConfig, open_run
from gentrain.training.saving import together
from gentrain.training.world import RankGroup, World
from gentrain.training.zero import shard_frozen


class RoleNets:
    """See methods.base.Nets."""

    def __init__(self, group: RankGroup, decode: Callable[[Tensor], Tensor], networks: dict[str, Any]):
        self.group, self.decode = group, decode
        self.__dict__.update(networks)

    def __getattr__(self, role: str) -> Any:
        roles = ", ".join(name for name in self.__dict__ if name not in ("group", "decode"))
        raise AttributeError(f"the method has no role {role!r}; its roles: {roles}")


class Roles:
    """Every role's network: an engine for those that learn, a plain frozen module for the others.

    A role that learns an adapter, or some parameters, gives its engine these alone. What lies below them is held once for all roles that
    begin with the same weights; a frozen role among them is that network as it is.

    Args:
        resume: a checkpoint to continue from, None for a fresh start.

    Attributes:
        codec: what stands between data and networks.
        bases: role on a network that it shares -> digest of the weights below it.
        digests: frozen role whose samples the method's pools hold -> digest of its weights.
    """

    def __init__(self, run: RunConfig, world: World, resume: Checkpoint | None = None):
        self.run, self.world, self.group = run, world, RankGroup(world.size)
        run.fit_space()
        run.check_space()
        if world.rank == 0:
            warn_of_fast_times(run)
            warn_of_untrained_null(run)
        self.engines: dict[str, RoleEngine] = {}
        self.frozen: dict[str, nn.Module] = {}
        self.codec = run.codec().to(world.device)
        self._shared: dict[str, Base] = {}
        above = {name for name in run.method.roles if run.part_of(name) is not None}
        places = {place_of(run, name) for name in above if learning_below(run, name) is None}
        drawing = {pool.role for pool in run.method.pools().values()}
        self.digests: dict[str, str] = {}
        for name, role in run.method.roles.items():
            if name in above:
                module: nn.Module = self._above(name)
            elif not isinstance(role, Trained) and place_of(run, name) in places:
                self.frozen[name] = self._base(name).network
                self.digests[name] = self._base(name).digest
                continue
            else:
                module = build_network(run, name)
                if resume is None or not isinstance(role, Trained):
                    _begin(run, name, module)
                if name in drawing:
                    self.digests[name] = digest_of(module.state_dict())  # before they are rounded
                module = module.to(run.engine_of(name).live_dtype)
            if run.training.compile:
                compile_blocks(module)
            if isinstance(role, Trained):
                module = module.to(world.device)
                if run.training.recompute:
                    recompute(module)
                hold_the_rest(run, name, module)
                number_groups(run, name, module)
                self.engines[name] = run.engine_of(name).build(name, module, run.optimizer_of(name), world)
                if role.ema:
                    self.engines[name].start_ema(len(run.training.power_ema))
            else:
                self.frozen[name] = module.eval().requires_grad_(False)
        self._dropouts = dropouts(run, [engine.module for engine in self.engines.values()])
        self.bases = {name: self._base(name).digest for name in above}
        if resume is not None:
            _refuse_other_bases(resume, self.bases)
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

    def drop(self, samples: int) -> None:
        """Has networks that learn drop units, or not, as the configuration says for the step after so many samples."""
        training = self.run.training
        on = training.dropout_from <= samples and (training.dropout_until is None or samples < training.dropout_until)
        for module, share in self._dropouts.items():
            module.p = share if on else 0.0

    def _base(self, name: str) -> Base:
        """The network that the role shares: a frozen one, or that of another role as it learns."""
        learning, place = learning_below(self.run, name), place_of(self.run, name)
        if learning is not None:
            return Base(self.engines[learning].module, live=True)
        if place not in self._shared:
            base = _first_base(self.run, name)
            base.network = base.network.to(self.run.engine_of(name).live_dtype).to(self.world.device)
            if self.run.role_settings(name).placement == "sharded":
                base.network = shard_frozen(base.network)
            self._shared[place] = base
        return self._shared[place]

    def _above(self, name: str) -> OnBase:
        return network_above(self.run, name, self._base(name))

    def spare(self, name: str) -> nn.Module:
        """A network like the role's, in evaluation mode, for weights of another time; what a role shares stays shared."""
        module = self._above(name) if name in self.bases else build_network(self.run, name)
        return module.to(self.world.device).eval().requires_grad_(False)

    def _view(self, stepped: str, frozen_calls: dict[str, Callable[..., Tensor]]) -> Nets:
        """What a loss of the role `stepped` sees."""
        learning = {name: engine if name == stepped else engine.through for name, engine in self.engines.items()}
        seen = {name: self.as_seen(name, call) for name, call in {**frozen_calls, **learning}.items()}
        return RoleNets(self.group, self.codec.decode, seen)

    def _frozen_call(self, name: str, module: nn.Module) -> Callable[..., Tensor]:
        """The frozen network's forward, float32, through which gradients reach its inputs, with its weights where `placement` says."""
        dtype, device = self.run.engine_of(name).live_dtype, self.world.device
        placement = self.run.role_settings(name).placement
        if not any(base.network is module for base in self._shared.values()):
            if placement == "sharded":
                module = shard_frozen(module.to(device))
            elif placement == "plain":
                module = module.to(device)
            self.frozen[name] = module

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if placement == "offloaded":  # the graph holds the copies until its backward, nothing holds them longer
                state = {key: value.to(device, non_blocking=True) for key, value in (*module.named_parameters(), *module.named_buffers())}
                output: Tensor = functional_call(module, state, (as_read(x, dtype), *args), kwargs)
            else:
                output = module(as_read(x, dtype), *args, **kwargs)
            return output.float()

        return call

    def as_seen(self, role: str, network: Any) -> Any:
        """The role's network as methods see it: a Denoiser or a TokenModel, or bare."""
        return self.run.seen(role, network)

    @contextmanager
    def stepping(self, role: str) -> Iterator[Nets]:
        """Within it only `role` learns; its losses get what this yields."""
        with ExitStack() as stack:
            for name, engine in self.engines.items():
                if name != role:
                    stack.enter_context(frozen(engine.module))
            self.engines[role].module.train(self.run.method.dropout)
            yield self._views[role]


def build_network(run: RunConfig, role: str) -> nn.Module:
    """The role's network with the random weights that (seed, role) give. Raises ConfigError when it does not fit the data."""
    torch.manual_seed(derive(run.seed, "weights", role))
    model, classifies = run.model_of(role), run.method.roles[role].classifier
    of_role = run.role_settings(role).model is not None or (classifies and not all(each.classifier for each in run.method.roles.values()))
    try:
        with torch.device("cpu"):  # sets that are held in memory may be read here, and on "meta" tensors hold no numbers
            classes = len(run.data.class_names)
            codec = run.codec()
            shape = codec.decoded_shape if model.decoded else codec.shape
    except ValueError as error:  # a folder of images that is not there
        raise ConfigError(str(error), source=run.output, key="data") from error
    try:
        if model.classifies != classifies:
            fit = ", ".join(name for name, other in Model.available().items() if other.classifies == classifies)
            what = "classifies" if classifies else "denoises"
            raise ValueError(f"a network that {what} is needed, and {model.registered_name} does not; there are: {fit}")
        model.check_shapes(codec.shapes)
        part, steering = run.method.roles[role], run.method.steering
        labels_steer = steering is not None and steering.labels and part.denoiser
        network, inputs = model.build(shape, 0 if labels_steer else classes), part.inputs
        if part.denoiser:
            inputs = (*inputs, *run.data.inputs)
        if inputs:
            add_inputs: Callable[[tuple[str, ...]], None] | None = getattr(network, "add_inputs", None)
            if add_inputs is None:
                raise ValueError(
                    f"{run.method.registered_name} on these data gives its network further inputs ({', '.join(inputs)}), which "
                    f"{model.registered_name} does not take"
                )
            add_inputs(inputs)
        if part.control is not None:
            _add_control(network, part.control, codec.decoded_shape, model)
        return network
    except ValueError as error:
        raise ConfigError(str(error), source=run.output, key=f"roles.{role}.model" if of_role else "model") from error


def _add_control(network: nn.Module, control: Extractor, shape: tuple[int, ...], model: Model) -> None:
    add: Callable[[Form], None] | None = getattr(network, "add_control", None)
    if add is None:
        raise ValueError(f"{model.registered_name} takes no control; take unet, dit or mlp")
    with errors_about("method.control"):
        control.check_shape(shape)
        form = control.form(shape)
    add(form)


def count_parameters(run: RunConfig, role: str) -> tuple[int, int]:
    """Of the role's network, and those of them (or of its adapter) that learn, without making weights. Raises ConfigError as above."""
    with torch.device("meta"):
        network = build_network(run, role)
        count = sum(p.numel() for p in network.parameters())
        if not isinstance(run.method.roles[role], Trained):
            return count, 0
        learning = network if run.part_of(role) is None else network_above(run, role, Base(network))
        number_groups(run, role, learning)
        return count, sum(p.numel() for p in learning.parameters())


def network_above(run: RunConfig, role: str, base: Base) -> OnBase:
    """What the role learns, on `base`: an adapter has the random weights that (seed, role) give, or those of the role whose copy it is,
    heads have random ones.

    Raises ConfigError when it does not fit.
    """
    part, copied, settings = run.part_of(role), run.method.roles[role].init, run.role_settings(role)
    torch.manual_seed(derive(run.seed, "adapter", copied if copied is not None and run.part_of(copied) == part else role))
    try:
        if isinstance(part, Adapter):
            key = "adapter.targets" if settings.adapter is None else f"roles.{role}.adapter.targets"
            above, inputs = Adapted(base, part), run.method.roles[role].inputs
            if inputs and not any(name.startswith("inputs.") for name in above.targets):
                remedy = f"name {inputs[0]}, too"
                if any(run.part_of(name) == part and not each.inputs for name, each in run.method.roles.items()):
                    key = f"roles.{role}.adapter.targets"
                    remedy = f"give the role an adapter of its own that names {inputs[0]}, too: the others have no such layer"
                elif inputs == ("guidance",):
                    remedy += ", or take two equal weights in method.guidance, which need no input"
                raise ValueError(f"no layer that reads {', '.join(inputs)} is among the targets; {remedy}")
            return above
        if isinstance(part, Heads):
            key = "method.critic_heads.layers"
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                shapes = feature_shapes(build_network(run, role), part, run.codec().shape)
            return FeatureCritic(base, part, shapes)
        key = "trainable" if settings.trainable is None else f"roles.{role}.trainable"
        return Partial(base, str(part))
    except ValueError as error:
        raise ConfigError(str(error), source=run.output, key=key) from error


def _first_base(run: RunConfig, role: str) -> Base:
    """What lies below what the role learns, on the host."""
    network = build_network(run, role)
    _begin(run, role, network)
    base = Base(network)
    base.digest = digest_of(network.state_dict())
    return base


def learning_below(run: RunConfig, role: str) -> str | None:
    """The role that learns whose features this one reads, if it reads any of such a one."""
    heads = run.method.roles[role].heads
    return heads.of if heads is not None and isinstance(run.method.roles[heads.of], Trained) else None


def place_of(run: RunConfig, role: str) -> str:
    """Roles with one of these may share a frozen network."""
    settings, part = run.role_settings(role), run.method.roles[role]
    return f"{_origin(run, role)} {run.engine_of(role).live_dtype} {settings.placement} {part.inputs} {part.control}"


def _origin(run: RunConfig, role: str) -> str:
    """Names the weights that the role starts from: roles with the same one start alike."""
    settings, copied = run.role_settings(role), run.method.roles[role].init
    if settings.weights is not None:
        try:
            source = source_of(open_run(settings.weights), role)
        except ConfigError:  # not trained yet, which only a plan may meet: loading them says so
            source = ""
        return f"weights of {settings.weights} {source} in {to_dict(run.model_of(role))}"
    if copied is not None:
        return _origin(run, copied)
    return f"{'' if run.model_of(role).law() else role} {to_dict(run.model_of(role))}"


def _refuse_other_bases(resume: Checkpoint, bases: dict[str, str]) -> None:
    saved = resume.state.get("bases", {})
    for role, digest in bases.items():
        if saved.get(role) != digest:
            raise CheckpointError(
                f"what role {role!r} learnt in {resume.where} was trained on other weights than those below it now; "
                "restore the pipeline or the run that they came from"
            )


def _begin(run: RunConfig, role: str, network: nn.Module) -> None:
    """Gives the role's freshly built network what it starts from."""
    with run.errors_here():
        load_into(network, _first_weights(run, role, network), f"roles.{role}.weights")


def _first_weights(run: RunConfig, role: str, module: nn.Module) -> State:
    """What the role's freshly built network starts from; of a role that has gone on since, too, when a frozen one copies it."""
    settings, copied = run.role_settings(role), run.method.roles[role].init
    if settings.weights is not None:
        weights = load_weights(settings.weights, f"roles.{role}.weights", role)
        refuse_other_law(run, role)
        return weights
    return _first_weights(run, copied, build_network(run, copied)) if copied is not None else module.state_dict()


def load_weights(directory: str, key: str = "", role: str = "") -> State:
    """Weights of a run's newest checkpoint: the average where it keeps one. Raises ConfigError.

    Of the run's role of the name `role` if one that learns is called so, else of its generator (or its only role).
    """
    run = open_run(directory, key)
    role = source_of(run, role)
    if not isinstance(run.method.roles[role], Trained):  # a pipeline as it was adopted
        return _first_weights(run, role, build_network(run, role))
    if run.storage.latest() is None:
        raise ConfigError(f"{directory} has no checkpoint yet; train it first", key=key)
    if isinstance(run.part_of(role), Heads):
        raise ConfigError(f"the role {role!r} of {directory} is heads on a network's features, which begin anew; leave it out", key=key)
    if run.part_of(role) is not None:
        return _load_above(run, role).merged()
    weights = run.storage.read_newest(lambda checkpoint: _saved(checkpoint, run, role))
    assert weights is not None
    return weights


def _saved(checkpoint: Checkpoint, run: RunConfig, role: str) -> State:
    trained = run.method.roles[role]
    return checkpoint.shards(f"{role}.ema" if isinstance(trained, Trained) and trained.ema else f"{role}.weights").whole()


def _load_above(run: RunConfig, role: str) -> OnBase:
    """What the role has learnt by the newest checkpoint on its base, on the host."""
    base = _first_base(run, role)
    module = network_above(run, role, base)

    def read(checkpoint: Checkpoint) -> State:
        _refuse_other_bases(checkpoint, {role: base.digest})
        return _saved(checkpoint, run, role)

    weights = run.storage.read_newest(read)
    assert weights is not None
    load_into(module, weights, f"roles.{role}")
    return module


def load_network(directory: str | Path, null_prompt: str | None = None) -> tuple[Any, RunConfig]:
    """A run's generator as a Denoiser or a TokenModel (a bare network of a method without one), in evaluation mode; its configuration.

    null_prompt: what stands for no condition, of a network that takes prompts; None = as in the run.

    Raises ConfigError when the run has no checkpoint, CheckpointError when that is damaged.
    """
    run = open_run(directory)
    names = [name for name, role in run.method.roles.items() if isinstance(role, Trained)]
    role = run.method.generator or names[0]
    if null_prompt is not None:
        run.model_of(role).null_prompt = null_prompt  # type: ignore[attr-defined]
    weights = load_weights(str(directory)) if run.part_of(role) is None or run.storage.latest() is None else None
    if weights is None:
        module: nn.Module = _load_above(run, role)
    else:
        module = build_network(run, role)
        load_into(module, weights, "model")
    module.eval().requires_grad_(False)
    run.fit_space()
    return run.seen(role, module), run
