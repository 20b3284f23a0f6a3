"""Of which role of another run a role is given the weights, and whether the two read them alike."""

from __future__ import annotations

from pathlib import Path

from gentrain.config import ConfigError
from gentrain.methods.base import Trained
from gentrain.models.base import Model
from gentrain.paths.base import same_law
from gentrain.samplers.euler import Euler
from gentrain.training.run import CONFIG, RunConfig, described, open_run


def source_of(run: RunConfig, role: str) -> str:
    """Which of a run's roles gives its weights to `role` of another run: the one of that name if it learns, else the generator."""
    names = [name for name, each in run.method.roles.items() if isinstance(each, Trained)]
    return role if role in names else run.method.generator or names[0]


def refuse_other_law(run: RunConfig, role: str) -> None:
    """Raises ConfigError when the weights that a role starts from were trained on another path, as another prediction or with another scale
    of time than the run reads them, follow no flow where one is needed, are drawn from otherwise where one call is, or by a model that
    reads otherwise.

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
    if run.method.roles[role].flow:
        try:
            theirs.method.check_sampler(Euler())
        except ValueError as error:
            said = f"{weights} holds a student of {theirs.method.registered_name}, which follows no flow; name its teacher's run"
            raise ConfigError(said, key=f"roles.{role}.weights") from error
    drawn = (theirs.method.own_sampler(), run.method.own_sampler())
    if run.method.roles[role].one_step and isinstance(theirs.method.roles[source], Trained) and drawn[0] != drawn[1]:
        said = f"what {weights} holds is drawn from by {described(drawn[0])}, and here by {described(drawn[1])}"
        raise ConfigError(f"{said}; name the run of a one-step student of that sigma", key=f"roles.{role}.weights")
    models = (theirs.model_of(source), run.model_of(role))
    scales = [getattr(model, "time_scale", None) for model in models]
    if models[0].registered_name == models[1].registered_name and scales[0] != scales[1]:
        raise ConfigError(f"{weights} was trained with time_scale {scales[0]}, and is read with {scales[1]}; make them equal", key="model")
    if theirs.prediction != run.prediction or not same_law(theirs.path, run.path):
        said = f"path: {described(theirs.path)} and prediction: {theirs.prediction}"
        raise ConfigError(f"{weights} was trained otherwise than it is read here; give this run its {said}", key=f"roles.{role}.weights")


def refuse_other_reading(theirs: RunConfig, source: str, model: Model, key: str) -> None:
    """Raises ConfigError, about `key`, when `model` reads the weights of a role of a run otherwise than the run's own model does."""
    trained = theirs.model_of(source)
    for name in model.read_by if trained.registered_name == model.registered_name else ():
        if getattr(trained, name) != getattr(model, name):
            said = f"{theirs.output} was trained with {trained.registered_name} of {name}: {getattr(trained, name)}"
            raise ConfigError(f"{said}, and is read here with {name}: {getattr(model, name)}; make them equal", key=key)
