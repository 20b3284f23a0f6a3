"""A recipe: ordered stages with named outputs. What is finished is skipped, what was interrupted resumes, what changed runs again."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError
from pydantic import NonNegativeFloat, StringConstraints, TypeAdapter
from typing_extensions import TypedDict

from gentrain.cluster.stopping import StopRequested, interruptible
from gentrain.config import Component, ConfigError, Document, build, load, load_plugins, option, to_dict, to_yaml
from gentrain.models.families.source import outputs_to_come
from gentrain.training.cluster import Cluster, Submitting
from gentrain.training.remedies import refuse_url
from gentrain.training.run import RunConfig
from gentrain.training.settings import changed_keys
from gentrain.training.storage import replace_file

log = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
STAGES = "stages.json"
NAME = r"[\w-]+"  # of a stage


class State(TypedDict):
    """A stage in stages.json. `error`: why the last attempt failed."""

    kind: str
    status: Literal["finished", "running", "stopped", "failed"]
    reason: str
    seconds: NonNegativeFloat
    fingerprint: Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$")]  # becomes part of a directory's name
    inputs: dict[str, str]
    settings: dict[str, Any]
    error: NotRequired[str]


_STATES = TypeAdapter(dict[Annotated[str, StringConstraints(pattern=f"^{NAME}$")], State])


class Stopped(Exception):
    """A stage was asked to stop and has published what it had; running the recipe again goes on from there."""


class Stage(Component, kind="stage"):
    """One step of a recipe. Fields are its configuration; `${output:NAME}` in one is the directory of the stage NAME."""

    def execute(self, directory: Path) -> None:
        """Does the work; everything it makes lies under `directory`, where an interrupted attempt may have left something.

        Raises Stopped when asked to stop.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What the result depends on: the stage runs again when this changes."""
        values: dict[str, Any] = to_dict(self)
        return values

    def place(self, directory: Path) -> None:
        """Told its directory before `settings` is asked for."""

    def check(self, places: Mapping[Path, Stage]) -> None:
        """Raises ConfigError, about a key of its own, for what other stages show to be impossible: as the recipe loads, before any runs.

        places: the absolute directory of each stage before it -> that stage.
        """

    @property
    def trained(self) -> RunConfig | None:
        """The run that it trains, if it does."""
        return None

    @property
    def under_ray(self) -> bool:
        """Whether it trains on workers or actors of Ray, which a lost head takes along."""
        return self.trained is not None and self.trained.cluster.place == "ray"

    @property
    def held(self) -> str:
        """What it computes on, for `plan`. It holds that from its beginning to its end, and nothing after."""
        if self.trained is not None and self.trained.cluster.place == "ray":
            cluster = self.trained.cluster
            sizes = f"{cluster.most}" if cluster.fewest == cluster.most else f"{cluster.fewest} to {cluster.most}"
            return f"{sizes} workers under Ray Train, each with {share_of(cluster)}"
        actors = 0 if self.trained is not None else getattr(self, "actors", 0)
        return f"a fleet of at most {actors} actors, a core and, where there are any, a GPU each" if actors else "this process"


def share_of(cluster: Cluster) -> str:
    """What a worker takes, in words."""
    cores = "a core" if cluster.cpus_per_worker == 1 else f"{cluster.cpus_per_worker} cores"
    return f"{cores} and {cluster.gpus_per_worker:g} GPUs" if cluster.gpus_per_worker else cores


@dataclass
class RecipeConfig:
    """A recipe as configured."""

    stages: dict[str, Stage] = option(help="name -> stage, run in this order")
    cluster: Submitting = option(Submitting, "where `gentrain submit` sends it; where a run's processes live is for each run to say")
    plugins: list[str] = option(list, "the user's own modules: .py files or importable names")
    output: str = option("runs/recipe", "the recipe's directory")

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("a recipe needs at least one stage", key="stages")
        refuse_url(self.output, "output")

    @property
    def directory(self) -> Path:
        return Path(self.output)


def _output_of(stage: str, *, _root_: Any) -> str:
    """The resolver of `${output:STAGE}`."""
    stages = list(_root_.get("stages") or ())
    if stage not in stages:
        raise InterpolationResolutionError(f"no stage is called {stage!r}; stages: {', '.join(stages) or 'none, this is no recipe'}")
    return f"{_root_.output}/{stage}"


OmegaConf.register_resolver("output", _output_of, replace=True)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> RecipeConfig:
    """Reads a recipe; its directory is runs/<file name> unless it says otherwise. Raises ConfigError."""
    path = Path(path)
    document = load(path, overrides, {"output": f"runs/{path.stem}"})
    if "stages" not in document.values and "method" in document.values:
        raise document.error("method", f"this is a run, not a recipe; train it with: gentrain train {path}")
    load_plugins(document)
    stages = document.values.get("stages")
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        if not re.fullmatch(NAME, name):
            raise document.error(f"stages.{name}", "a stage's name becomes a directory: letters, digits, - and _ only")
        if isinstance(stage, dict) and isinstance(stage.get("run"), dict):
            _load_plugins_of_run(document, name)
            if "output" in stage["run"]:
                log.warning(
                    "%s: stages.%s.run.output is not used: the run's directory is %s/%s",
                    document.origin(f"stages.{name}.run.output"), name, document.values["output"], name,
                )  # fmt: skip
    with outputs_to_come([Path(str(document.values["output"]), name) for name in stages or ()]):
        recipe = build(RecipeConfig, document)
    for name, stage in recipe.stages.items():
        stage.place(recipe.directory / name)
    _check_order(recipe, document.error)
    _check_samplers(recipe, document.error)
    _check_stages(recipe, document.error)
    return recipe


def is_recipe(path: str | Path, overrides: Iterable[str] = ()) -> bool:
    """Whether the file has stages. Raises ConfigError when it cannot be read."""
    return "stages" in load(path, overrides, {"output": ""}).values


def _load_plugins_of_run(document: Document, stage: str) -> None:
    """The recipe's plugins become the run's, too: its workers, and whoever opens it later, know nothing of the recipe."""
    section = document.section(f"stages.{stage}.run")
    load_plugins(section)
    section.values["plugins"] = list(dict.fromkeys([*document.values["plugins"], *section.values["plugins"]]))


def _dependencies(recipe: RecipeConfig, stage: Stage) -> list[str]:
    """The stages whose outputs, or something in them, this one reads."""
    texts, output = list(_texts(stage.settings())), to_dict(recipe)["output"]  # both as written: neither shows the environment
    places = (output, str(Path(output).absolute()))
    return [name for name in recipe.stages if any(f"{text}/".startswith(f"{place}/{name}/") for text in texts for place in places)]


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _check_order(recipe: RecipeConfig, error: Callable[[str, str], ConfigError]) -> None:
    seen: set[str] = set()
    for name, stage in recipe.stages.items():
        late = [needed for needed in _dependencies(recipe, stage) if needed not in seen]
        if late:
            what = "its own output" if late[0] == name else f"the output of {late[0]!r}, which comes later; put {late[0]!r} first"
            raise error(f"stages.{name}", f"it reads {what}")
        seen.add(name)


def _check_samplers(recipe: RecipeConfig, error: Callable[[str, str], ConfigError]) -> None:
    """Of stages that draw from a run of the recipe: before it is trained."""
    runs = {str(recipe.directory / name): stage.trained for name, stage in recipe.stages.items()}
    for name, stage in recipe.stages.items():
        run, sampler = runs.get(str(getattr(stage, "run", None))), getattr(stage, "sampler", None)
        if run is None or sampler is None or any(run.model_of(role).to_come for role in run.method.roles):
            continue  # of a pipeline that is to come nobody knows the path
        try:
            run.drawn_with(sampler)
        except ConfigError as wrong:
            raise error(f"stages.{name}.sampler", wrong.message) from wrong


def _check_stages(recipe: RecipeConfig, error: Callable[[str, str], ConfigError]) -> None:
    places: dict[Path, Stage] = {}
    for name, stage in recipe.stages.items():
        try:
            stage.check(places)
        except ConfigError as wrong:
            raise error(f"stages.{name}.{wrong.key}", wrong.message) from wrong
        places[(recipe.directory / name).absolute()] = stage


def run_recipe(recipe: RecipeConfig, say: Callable[[str], None]) -> None:
    """Runs the stages that have to run. `say` is told what is done and why.

    Raises Stopped, and whatever a stage raises; either is recorded in stages.json, and the recipe can be run again.
    """
    directory = recipe.directory
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RECIPE).write_text(to_yaml(recipe))
    states = read_states(directory)
    for name in [name for name in states if name not in recipe.stages]:
        del states[name]
    _write_states(directory, states)
    for name, stage in recipe.stages.items():
        settings = stage.settings()
        inputs = {needed: states[needed]["fingerprint"] for needed in _dependencies(recipe, stage)}
        fingerprint = _fingerprint(settings, inputs)
        before = states.get(name)
        why = _why(before, fingerprint, settings, inputs)
        if why is None and not (directory / name).exists():
            why = "runs again: its output is gone"
        if why is None:
            say(f"{name}: finished before, skipped")
            continue
        say(f"{name}: {why}")
        if before is None or before["fingerprint"] != fingerprint:
            _set_aside(directory / name, "unknown" if before is None else before["fingerprint"], say)
        spent = before["seconds"] if before is not None and before["fingerprint"] == fingerprint else 0.0
        state: State = {
            "kind": stage.registered_name, "status": "running", "reason": why, "seconds": spent, "fingerprint": fingerprint,
            "inputs": inputs, "settings": settings,
        }  # fmt: skip
        states[name] = state
        _write_states(directory, states)
        started = time.monotonic()
        try:
            with interruptible():
                stage.execute(directory / name)
            state["status"] = "finished"
        except BaseException as error:
            state["status"] = "stopped" if isinstance(error, Stopped | StopRequested | KeyboardInterrupt) else "failed"
            if state["status"] == "failed":
                state["error"] = str(error) or type(error).__name__
            raise
        finally:
            state["seconds"] = round(spent + time.monotonic() - started, 2)
            _write_states(directory, states)
        say(f"{name}: finished in {state['seconds']:.0f} s")


_ENDED = {"running": "was killed", "stopped": "was stopped", "failed": "failed"}


def _why(before: State | None, fingerprint: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str | None:
    """Why a stage has to run, None when it has not."""
    if before is None:
        return "not run yet"
    if before["fingerprint"] == fingerprint:
        return None if before["status"] == "finished" else f"going on: the last attempt {_ENDED[before['status']]}"
    changed = changed_keys(before["settings"], settings)
    if changed:
        return f"runs again: {', '.join(changed[:3])}{' and more' if len(changed) > 3 else ''} changed"
    return f"runs again: {', '.join(name for name in inputs if before['inputs'].get(name) != inputs[name])} ran again"


def _fingerprint(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps([settings, inputs], sort_keys=True).encode()).hexdigest()[:16]


def _set_aside(directory: Path, fingerprint: str, say: Callable[[str], None]) -> None:
    """Keeps the output of other settings under another name: a recipe never deletes what took hours."""
    if directory.exists():
        aside = directory.with_name(f"{directory.name}.{fingerprint[:8]}")
        number = 1
        while aside.exists():
            number += 1
            aside = directory.with_name(f"{directory.name}.{fingerprint[:8]}-{number}")
        directory.rename(aside)
        say(f"{directory.name}: its former output is kept in {aside}")


def read_states(directory: Path) -> dict[str, State]:
    """stages.json of a recipe's directory, empty before the first run. Raises ConfigError when it is damaged."""
    try:
        return _STATES.validate_json((directory / STAGES).read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        remedy = "restore it, or move the directory away to run every stage from its beginning"
        what = " ".join(str(error).partition("For further")[0].split())[:200]
        raise ConfigError(f"damaged ({what}); {remedy}", source=str(directory / STAGES)) from error


def _write_states(directory: Path, states: Mapping[str, Any]) -> None:
    replace_file(directory / STAGES, json.dumps(states, indent=1))
