"""Whether the parts of a run's configuration go together."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gentrain.config import ConfigError, errors_about
from gentrain.data.concepts import Concepts
from gentrain.data.tokens import TokenData
from gentrain.methods.base import Clock, Follow, Method, Trained
from gentrain.models.adapters import Adapter
from gentrain.models.base import Model
from gentrain.models.partial import check_pattern

if TYPE_CHECKING:
    from gentrain.training.run import RoleSettings, RunConfig

log = logging.getLogger(__name__)


def check_parts(run: RunConfig) -> None:
    """Of what a role learns beside a whole network. Raises ConfigError."""
    every: dict[str, RunConfig | RoleSettings] = {"": run, **{f"roles.{name}.": settings for name, settings in run.roles.items()}}
    for name, given in every.items():
        role = run.method.roles[name.split(".")[1]] if name else None
        if role is not None and role.heads is not None:
            for key in ("weights", "model", "adapter", "trainable"):
                if getattr(given, key):
                    raise ConfigError(f"this role learns heads on the features of {role.heads.of}; leave it out", key=f"{name}{key}")
        for key in ("adapter", "trainable"):
            if role is not None and not isinstance(role, Trained) and getattr(given, key):
                raise ConfigError("this role does not learn; leave it out", key=f"{name}{key}")
        if given.trainable is None:
            continue
        if given.adapter is not None:
            raise ConfigError("a role learns an adapter or some of its parameters, not both; leave one out", key=f"{name}trainable")
        try:
            check_pattern(given.trainable)
        except ValueError as error:
            raise ConfigError(str(error), key=f"{name}trainable") from error
    for name, role in run.method.roles.items():
        if role.control is not None and isinstance(run.part_of(name), Adapter):
            own = run.role_settings(name).adapter is not None
            said = f"an adapter would leave the branch of role {name!r}, which reads the control, without effect; leave it out"
            raise ConfigError(said, key=f"roles.{name}.adapter" if own else "adapter")


def check_optimizers(run: RunConfig) -> None:
    """Of each role that learns: with its engine, its average, its groups and the batch; others have none. Raises ConfigError."""
    for name, role in run.method.roles.items():
        if not isinstance(role, Trained):
            for key in ("optimizer", "schedule", "groups"):
                if getattr(run.role_settings(name), key):
                    raise ConfigError("this role does not learn; leave it out", key=f"roles.{name}.{key}")
            continue
        try:
            optimizer = run.optimizer_of(name)
        except ValueError as error:
            raise ConfigError(str(error), key="training.reference_batch_size") from error
        chosen = optimizer.registered_name
        if optimizer.needs not in run.engine_of(name).shows:
            raise ConfigError(
                f"{chosen} needs {optimizer.needs} access to the parameters of role {name!r}, which this engine does not give; "
                "set engine.zero_stage to 0, engine to torch, or take an elementwise optimiser (adamw, sgd)",
                key="optimizer",
            )
        if optimizer.averages and not role.ema:
            raise ConfigError(f"{chosen} learns an average, and role {name!r} keeps none; give it adamw", key=f"roles.{name}.optimizer")
        if optimizer.averages and run.training.power_ema:
            said = f"they would be of where {chosen} takes gradients, not of what it learns; leave them out"
            raise ConfigError(said, key="training.power_ema")
        if run.role_settings(name).groups and optimizer.one_lr:
            said = f"{chosen} has one step size for all parameters; leave them out, or take adamw"
            raise ConfigError(said, key=f"roles.{name}.groups")


def check_method(run: RunConfig) -> None:
    """The method with the path, the networks, the engines and the data. Raises ConfigError."""
    for key in ("recompute", "compile"):
        if getattr(run.training, key) and run.method.forward_mode:
            raise ConfigError("derivatives in forward mode do not pass through it; set it to false", key=f"training.{key}")
        if getattr(run.training, key) and any(run.part_of(name) is not None for name in run.method.roles):
            raise ConfigError("it would lose what a role learns beside its network; set it to false", key=f"training.{key}")
        if getattr(run.training, key) and any(run.engine_of(name).registered_name != "torch" for name in run.method.roles):
            raise ConfigError("it goes with engine: torch only; set that, or this to false", key=f"training.{key}")
    if run.method.pools() and not run.data.to_come and len(run.data.shapes) > 1:
        raise ConfigError("samples of the method's pools have one shape; leave it out", key="data.buckets")
    for name in run.method.forward_mode:
        if not run.engine_of(name).forward_mode:
            raise ConfigError(
                f"forward-mode derivatives of role {name!r} do not pass through ZeRO stage 3; set engine.zero_stage to 2 or less, or "
                "method.derivative to difference",
                key="engine.zero_stage",
            )
    for key in ("dropout_from", "dropout_until"):
        if getattr(run.training, key) and not run.method.dropout:
            raise ConfigError(f"{run.method.registered_name} drops no units; leave it out", key=f"training.{key}")
    training = run.training
    first = -(-training.dropout_from // training.batch_size) * training.batch_size  # where a step begins
    if first >= min(training.samples, training.dropout_until or training.samples):
        raise ConfigError("no step of the run would drop units; lower it, or raise training.dropout_until", key="training.dropout_from")
    steps, every = -(-training.samples // training.batch_size), getattr(run.method, "student_every", 1)
    if every > steps:
        raise ConfigError(f"the run has {steps} steps, in which the student would never learn; lower it", key="method.student_every")
    _check_tokens(run)
    allowed = run.method.predictions
    if allowed is not None and run.prediction not in allowed:
        raise ConfigError(
            f"{run.method.registered_name} needs a network that predicts {' or '.join(allowed)}, not {run.prediction}",
            key="prediction",
        )
    with errors_about("method", otherwise="path"):
        run.method.check(run.path)
    _check_followers(run)
    _check_own_networks(run)
    if not (run.data.to_come or any(run.model_of(role).to_come for role in run.method.roles)):  # nor perhaps its latents
        _check_data(run)


def warn_of_fast_times(run: RunConfig) -> None:
    """Of networks that a method differentiates by a time that they embed with fast sines. Before training, not whenever a run is opened."""
    for name in run.method.forward_mode:
        if getattr(run.model_of(name), "time_scale", 0.0) > 0.03:
            log.warning(
                "a derivative by time passes through the time embedding of role %r, which turns by hundreds of radians over the path: "
                "train it, and what it begins with, with model.time_scale: 0.01, or expect a poor student",
                name,
            )


def _check_followers(run: RunConfig) -> None:
    if not any(isinstance(role, Trained) for role in run.method.roles.values()):
        return  # as_is has no updates
    for update in run.method.updates(Clock(0, run.training.batch_size, run.training.samples)):
        if not isinstance(update, Follow):
            continue
        said = f"the role follows {update.of!r}, each rank its own part of the weights; give both the same"
        if run.engine_of(update.role) != run.engine_of(update.of):
            raise ConfigError(f"{said} engine", key=f"roles.{update.role}.engine")
        if run.part_of(update.role) != run.part_of(update.of):
            raise ConfigError(f"{said} adapter or trainable, or leave those to the run", key=f"roles.{update.role}")


def _check_own_networks(run: RunConfig) -> None:
    for name, role in run.method.roles.items():
        given = run.role_settings(name).model
        if not role.denoiser and role.model is not None and given is not None and type(given) is not type(role.model):
            own = role.model.registered_name
            raise ConfigError(f"the method brings a network of its own, {own}; leave it out", key=f"roles.{name}.model")


def _check_data(run: RunConfig) -> None:
    if run.data.weighted and not run.method.weighs:
        able = ", ".join(name for name, method in Method.available().items() if method.weighs)
        raise ConfigError(f"{run.method.registered_name} does not weigh its samples, which have weights; these do: {able}", key="data")
    with errors_about("method", otherwise="data"):
        run.method.check_data(run.data)
    if run.data.blank and run.method.reads_data:
        said = f"{run.method.registered_name} learns from the data themselves here, and {run.data.registered_name} holds none: each x is 0"
        raise ConfigError(f"{said}; name a data set that does", key="data")
    with errors_about("", otherwise="data"):
        _check_prompts(run)


def _check_prompts(run: RunConfig) -> None:
    """That the networks read prompts, where they are all that the method goes by."""
    data, reads = run.data, f"{run.model.registered_name} reads no prompts"
    if isinstance(data, Concepts) and not run.codec().takes_prompts:
        remedy = "take the network of a text-to-image pipeline (model: pretrained), or data with classes and method.forget"
        raise ConfigError(f"{reads}, so that nothing would be forgotten; {remedy}", key="data")
    for key, none in (("guidance", 1.0), ("mixing", 0.0)):
        given = getattr(run.method, key, none)
        guided = any(weight != none for weight in (given if isinstance(given, list | tuple) else [given]))
        if guided and not data.class_names and data.captions and not run.codec().takes_prompts:
            raise ConfigError(f"{reads}, so that the captions guide nothing; set it to {none:g}", key=f"method.{key}")


def _check_tokens(run: RunConfig) -> None:
    method, of_tokens = run.method.registered_name, run.method.of_tokens
    what = ("numbers", "tokens")
    if isinstance(run.data, TokenData) != of_tokens:
        raise ConfigError(f"{method} learns from {what[of_tokens]}, {run.data.registered_name} has {what[not of_tokens]}", key="data")
    for name, role in run.method.roles.items():
        model = run.model_of(name)
        if role.denoiser and model.of_tokens != of_tokens:
            fit = ", ".join(key for key, each in Model.available().items() if each.of_tokens == of_tokens and not each.classifies)
            key = "model" if run.role_settings(name).model is None else f"roles.{name}.model"
            raise ConfigError(f"{method} needs a network of {what[of_tokens]}, not {model.registered_name}; there are: {fit}", key=key)
