"""Of which role of another run a role is given the weights, and whether the two read them alike."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from torch import nn

from gentrain.config import ConfigError
from gentrain.methods.base import Frozen, Trained
from gentrain.models.base import Model
from gentrain.paths.base import same_law
from gentrain.samplers.consistency import Consistency
from gentrain.samplers.euler import Euler
from gentrain.samplers.few_step import FewStep
from gentrain.samplers.one_step import OneStep
from gentrain.training.engine import State
from gentrain.training.run import CONFIG, RunConfig, described, open_run

log = logging.getLogger(__name__)

_GAINED = ("inputs.", "control.")
_AUGMENT = ("inputs.projections.augment.weight",)
_CLASSES = re.compile("label_embedding|class_embed")  # parameters that have a row for each class, and one for none


def source_of(run: RunConfig, role: str) -> str:
    """Which of a run's roles gives its weights to `role` of another run: the one of that name if it learns, else the generator."""
    names = [name for name, each in run.method.roles.items() if isinstance(each, Trained)]
    return role if role in names else run.method.generator or names[0]


def refuse_other_law(run: RunConfig, role: str) -> None:
    """Raises ConfigError when the weights that a role starts from were trained on another path, as another prediction or with another scale
    of time than the run reads them, are of another kind of generator than the role needs, or by a model that reads otherwise.

    Weights that are not there yet, which only a plan may meet, are not looked at.
    """
    weights = run.role_settings(role).weights
    if weights is None or not (Path(weights) / CONFIG).is_file():
        return
    theirs = open_run(weights, f"roles.{role}.weights")
    source = source_of(theirs, role)
    refuse_other_reading(theirs, source, run.model_of(role), f"roles.{role}.weights")
    if not run.method.roles[role].denoiser or not theirs.method.roles[source].denoiser:
        return
    _refuse_other_kind(theirs, source, run, role)
    models = (theirs.model_of(source), run.model_of(role))
    scales = [getattr(model, "time_scale", None) for model in models]
    if models[0].registered_name == models[1].registered_name and scales[0] != scales[1]:
        raise ConfigError(f"{weights} was trained with time_scale {scales[0]}, and is read with {scales[1]}; make them equal", key="model")
    if theirs.prediction != run.prediction or not same_law(theirs.path, run.path):
        said = f"path: {described(theirs.path)} and prediction: {theirs.prediction}"
        raise ConfigError(f"{weights} was trained otherwise than it is read here; give this run its {said}", key=f"roles.{role}.weights")


def _refuse_other_kind(theirs: RunConfig, source: str, run: RunConfig, role: str) -> None:
    """Raises ConfigError when the role needs a flow, a consistency function or a student of its calls, and a run's role is none."""
    wanted, weights, key = run.method.roles[role], run.role_settings(role).weights, f"roles.{role}.weights"
    if wanted.flow:
        try:
            theirs.method.check_sampler(Euler())
        except ValueError as error:
            said = f"{weights} holds a student of {theirs.method.registered_name}, which follows no flow; name its teacher's run"
            raise ConfigError(said, key=key) from error
    if not isinstance(theirs.method.roles[source], Trained):
        return
    drawn, here = theirs.method.own_sampler(), run.method.own_sampler()
    if drawn != here and (wanted.one_step or (wanted.alike and isinstance(drawn, OneStep | FewStep))):
        remedy = "name the run of a one-step student of that sigma" + (", or its teacher's" if wanted.alike else "")
        raise ConfigError(f"what {weights} holds is drawn from by {described(drawn)}, and here by {described(here)}; {remedy}", key=key)
    if wanted.consistency and not isinstance(drawn, Consistency):
        said = f"{weights} was trained by {theirs.method.registered_name}, which makes no consistency function"
        raise ConfigError(f"{said}; name a run of consistency_distillation or its kin", key=key)


def warn_of_untrained_null(run: RunConfig) -> None:
    """Of frozen roles that guide by a null class which their own training left out. Before training, not whenever a run is opened."""
    given = getattr(run.method, "guidance", 1.0)
    guided = any(weight != 1 for weight in (given if isinstance(given, list | tuple) else [given]))
    for name, role in run.method.roles.items():
        weights = run.role_settings(name).weights
        if not guided or weights is None or not isinstance(role, Frozen) or not role.denoiser or role.consistency:
            continue
        if getattr(open_run(weights, f"roles.{name}.weights").method, "label_dropout", None) == 0:
            log.warning(
                "method.guidance asks role %r for the null class, which %s, trained with method.label_dropout = 0, has never met: train it "
                "with 0.1, or set method.guidance to 1",
                name,
                weights,
            )


def refuse_other_reading(theirs: RunConfig, source: str, model: Model, key: str) -> None:
    """Raises ConfigError, about `key`, when `model` reads the weights of a role of a run otherwise than the run's own model does."""
    trained = theirs.model_of(source)
    for name in model.read_by if trained.registered_name == model.registered_name else ():
        if getattr(trained, name) != getattr(model, name):
            said = f"{theirs.output} was trained with {trained.registered_name} of {name}: {getattr(trained, name)}"
            raise ConfigError(f"{said}, and is read here with {name}: {getattr(model, name)}; make them equal", key=key)


def load_into(module: nn.Module, weights: State, key: str) -> None:
    """Gives a network weights, which may lack inputs and controls of its own. Raises ConfigError when they are of another network."""
    # inputs and controls that the weights' network did not have add nothing at first: see models.inputs, models.control
    gained = {name: value for name, value in module.state_dict().items() if name.startswith(_GAINED) and name not in weights}
    # what a network was told of the augmentation of its images adds nothing where nobody tells it
    weights = {name: value for name, value in weights.items() if name not in _AUGMENT or name in module.state_dict()} | gained
    mine, theirs = ({name: tuple(value.shape) for name, value in state.items()} for state in (module.state_dict(), weights))
    if mine != theirs:
        raise ConfigError(_difference(mine, theirs), key=key)
    module.load_state_dict(weights)
    if any(name.startswith("control.") for name in gained):
        module.begin_control()  # type: ignore[operator]


def _difference(mine: dict[str, tuple[int, ...]], theirs: dict[str, tuple[int, ...]]) -> str:
    """Why weights of the shapes `theirs` are not those of a role's network, by parameter, with the remedy."""
    other = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
    name, gained = other[0], [name for name in other if name not in mine]
    if name.startswith("inputs.projections.") and name in gained:
        said = f"the network that these weights are of is given {name.split('.')[2]!r}, too, and this role's is not"
        return f"{said}; name a run without, such as the one that they began from"
    if all(name.startswith("control.") for name in other):
        what = "has the branch of a control, which this role has not" if other == gained else "has the branch of another control"
        return f"the network that these weights are of {what}; name a run without one, such as the one that they began from"
    if all(_CLASSES.search(name) for name in other):
        there, here = (where[name][0] - 1 if name in where else 0 for where in (theirs, mine))
        said = f"the network that these weights are of knows {there or 'no'} classes, and this role's knows {here or 'none'}"
        without = "name a run on the data set `unlabelled`" if here == 0 else "wrap the data in the data set `unlabelled`"
        return f"{said}; {'take the data of that run, or name one on these' if there and here else without}"
    shapes = " and ".join(
        f"{list(where[name]) if name in where else 'absent'} in {what}" for where, what in ((theirs, "them"), (mine, "it"))
    )
    return f"the weights are of another network: {name!r} is {shapes}; give the role the `model:` of the run they come from"
