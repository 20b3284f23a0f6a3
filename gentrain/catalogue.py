"""What `gentrain methods` prints, every registered component and its fields; and what `gentrain plan` prints of a run."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from gentrain.cluster.places import Place
from gentrain.config import Component, ConfigError, build, describe, load, load_plugins, option, to_dict
from gentrain.data.base import Data
from gentrain.domains.base import Domain
from gentrain.extractors.base import Extractor
from gentrain.methods.base import Method, Trained
from gentrain.metrics.features import Features
from gentrain.models.base import Model
from gentrain.paths.base import Path, TimeLaw
from gentrain.paths.space import Space
from gentrain.recipes.base import Stage
from gentrain.rewards.base import Reward
from gentrain.samplers.base import Sampler
from gentrain.training.engine import Engine
from gentrain.training.given import refuse_other_law
from gentrain.training.memory import GIB, Memory, Part, Planner
from gentrain.training.optimizers import Optimizer, Schedule
from gentrain.training.roles import count_parameters
from gentrain.training.run import RunConfig
from gentrain.training.trackers import Tracker

_KINDS: tuple[type[Component], ...] = (
    Method,
    Path,
    TimeLaw,
    Space,
    Domain,
    Model,
    Data,
    Sampler,
    Reward,
    Extractor,
    Features,
    Optimizer,
    Schedule,
    Engine,
    Tracker,
    Stage,
    Place,
)


@dataclasses.dataclass
class _Settings:
    plugins: list[str] = option(list, "the user's own modules: .py files or importable names")


def add_plugins(overrides: Iterable[str]) -> None:
    """Registers what the user's own modules, named by an override `plugins=[...]`, hold. Raises ConfigError."""
    document = load(None, overrides)
    build(_Settings, document)
    load_plugins(document)


def kinds() -> dict[str, Mapping[str, type[Component]]]:
    """Kind -> name -> class, of everything that configurations can name."""
    return {kind.kind: kind.available() for kind in _KINDS}


def show(name: str, console: Console) -> None:
    """Prints what is registered under `name`, of any kind. Raises ConfigError with the nearest name."""
    found = [(kind, entries[name]) for kind, entries in kinds().items() if name in entries]
    if not found:
        import difflib

        everything = sorted({entry for entries in kinds().values() for entry in entries})
        near = difflib.get_close_matches(name, everything, 1, cutoff=0.5)
        remedy = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(everything)}"
        raise ConfigError(f"nothing is called {name!r}; {remedy}")
    for kind, component in found:
        console.print(f"[bold]{kind} {name}[/]\n{escape(_paragraphs(component.__doc__ or ''))}\n", highlight=False)
        table = Table(*(Column(title, overflow="fold") for title in ("field", "type", "default", "unit", "what it is", "source")))
        hints = typing.get_type_hints(component, include_extras=True)
        for field in dataclasses.fields(typing.cast(typing.Any, component)):
            unit, help, source = (field.metadata.get(key, "") for key in ("unit", "help", "source"))
            table.add_row(*map(escape, (field.name, describe(hints[field.name]), default_of(field), unit, help, source)))
        console.print(table if table.row_count else "It has no fields.")


def _paragraphs(text: str) -> str:
    import inspect

    return inspect.cleandoc(text)


def default_of(field: dataclasses.Field[typing.Any]) -> str:
    """A field's default as a reader of a configuration would write it."""
    if field.default is not dataclasses.MISSING:
        return "null" if field.default is None else str(field.default)
    if field.default_factory is not dataclasses.MISSING:
        value = to_dict(field.default_factory())
        return str(value["name"]) if isinstance(value, dict) and "name" in value else str(value)
    return "required"


def roles_table(name: str, run: RunConfig) -> Table:
    """Where a run trains, and the networks of its roles. Building them shows whether they fit the data: raises ConfigError."""
    cluster = run.cluster
    sizes = f"{cluster.most}" if cluster.fewest == cluster.most else f"{cluster.fewest} to {cluster.most}"
    place = f"{sizes} workers under Ray Train" if cluster.place == "ray" else "this process"
    share = run.training.batch_size // (run.training.micro_batches * cluster.most)
    table = Table("role", "network", "parameters", "that learn", "average", "engine", title=f"{name}: {place}, micro-batches of {share}")
    unknown = _unknown(run)
    for role, part in run.method.roles.items():
        learns = isinstance(part, Trained)
        engine = ", ".join(f"{key} {value}" for key, value in to_dict(run.engine_of(role)).items() if value) if learns else "frozen"
        average = "yes" if isinstance(part, Trained) and part.ema else ""
        if unknown:
            numbers = ("known when its data are written" if run.data.to_come else "known when its pipeline is written", "")
        else:
            count, learning = count_parameters(run, role)
            with run.errors_here():
                refuse_other_law(run, role)
            numbers = (f"{count:,}", f"{learning:,}" if learns else "")
        table.add_row(role, run.model_of(role).registered_name, *numbers, average, engine)
    return table


def _unknown(run: RunConfig) -> bool:
    """Whether an earlier stage has still to write what tells the shapes: a pipeline (and so its latents), or data."""
    return run.data.to_come or any(run.model_of(role).to_come for role in run.method.roles)


def plan_tables(runs: Mapping[str, RunConfig], limit: int | None, alone: bool = False) -> list[Table | str]:
    """Roles, placement and memory of each run. Raises ConfigError when its networks do not fit its data.

    Args:
        limit: bytes that one process has; None: not known.
        alone: no earlier stage has still to write what the data read, so that what is wrong with them is a mistake.
    """
    found: list[Table | str] = []
    for name, run in runs.items():
        found.append(roles_table(name, run))
        if not _unknown(run):
            found += memory_report(name, run, limit, alone)
    return found


def stages_table(stages: Mapping[str, Stage]) -> Table:
    """What each stage of a recipe computes on: one after the other, so that a fleet never waits for what a trainer holds."""
    table = Table("stage", "kind", "computes on", title="one after the other, each when the one before has given back what it held")
    for name, stage in stages.items():
        table.add_row(name, stage.registered_name, stage.held)
    return table


def memory_report(name: str, run: RunConfig, limit: int | None, alone: bool = False) -> list[Table | str]:
    """What one process of the run needs, role by role, what it would need otherwise, and whether `limit` bytes are enough.

    `roles_table` says whether its networks fit the data.
    """
    planner = Planner()
    try:
        memory = planner.memory(run)
    except ConfigError as error:
        if (error.key or "").startswith(("path.space", "data") if alone else "path.space"):
            raise
        # what an earlier stage has still to write
        return [f"{name}: its memory is not known yet: {escape(str(error))}"]
    found: list[Table | str] = [_memory_table(f"{name}: memory of one process, MiB", memory)]
    found += [
        f"The activations of {part.name} are {part.activations.assumed}."
        for part in memory.parts
        if part.activations is not None and part.activations.assumed
    ]
    others = Table("with", "all the time", "at most", title=f"{name}: memory otherwise, MiB", title_justify="left")
    for told, each in planner.alternatives(run).items():
        others.add_row(escape(told), _mib(each.resting), _mib(each.peak))
    return [*found, others, *_verdict(name, planner, run, memory, limit)]


def _memory_table(title: str, memory: Memory) -> Table:
    names = ("", "weights", "optimizer", "average", "buffers", "gradients", "activations", "working", "all the time", "while it learns")
    table = Table(*(Column(name, justify="right" if name else "left") for name in names), title=title, title_justify="left")
    for part in memory.parts:
        table.add_row(part.name, *map(_mib, _bytes_of(part)), _mib(part.resting), _mib(part.learning))
    table.add_section()
    table.add_row("at most", *[""] * 7, _mib(memory.resting), _mib(memory.peak))
    return table


def _bytes_of(part: Part) -> tuple[int, ...]:
    held, activations = part.held, part.activations
    if held is None or activations is None:
        return (part.weights, 0, 0, 0, 0, 0, 0)
    working = max(held.passing + activations.peak + part.gathered, held.stepping) - activations.saved
    optimizer, average = (held.optimizer, held.average if part.averaged else 0) if held.host is None else (0, 0)
    return held.weights, optimizer, average, held.buffers, held.gradients, activations.saved, max(working, 0)


def _verdict(name: str, planner: Planner, run: RunConfig, memory: Memory, limit: int | None) -> list[str]:
    host = f", and {memory.host / GIB:.3g} GiB on the host" if memory.host else ""
    needs = f"{name} needs {memory.peak / GIB:.3g} GiB per process while {memory.dearest} learns{host}"
    if limit is None:
        return [f"{needs}."]
    if memory.peak <= limit:
        return [f"{needs}: it fits into {limit / GIB:.3g} GiB."]
    told, least = planner.remedy(run, limit)
    changes = escape(" ".join(told))
    if least.peak <= limit:
        return [f"{needs}: it does not fit into {limit / GIB:.3g} GiB. It needs {least.peak / GIB:.3g} GiB with: {changes}"]
    tried = f"; with {changes} it still needs {least.peak / GIB:.3g} GiB" if told else ""
    return [f"{needs}: it does not fit into {limit / GIB:.3g} GiB{tried}. Take more processes, a smaller network or a smaller batch"]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}" if size else ""
