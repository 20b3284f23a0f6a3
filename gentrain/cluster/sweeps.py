"""Sweeps: one run many times, each with other values of some keys. What is drawn, and the record of what has become of each trial."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter
from typing_extensions import TypedDict

from gentrain.cluster.progress import last_record
from gentrain.config import ConfigError, Document, build, load, option, to_dict
from gentrain.noise import derive
from gentrain.report import SWEEP, short
from gentrain.training.run import METRICS, RunConfig, parse_run
from gentrain.training.settings import changed_keys
from gentrain.training.storage import replace_file

log = logging.getLogger(__name__)

TRIALS = "trials"
MAX_TRIALS = 1_000
_FIXED = ("base", "cluster", "output", "plugins", "stages", "sweep")  # sections that are the same for all trials

Number = int | float
Status = Literal["waiting", "running", "stopped early", "finished", "diverged", "failed"]


@dataclass
class Range:
    """Numbers from low to high; whole ones where both ends are."""

    low: Number = option(help="smallest")
    high: Number = option(help="largest")
    scale: Literal["linear", "log"] = option("linear", "what is drawn evenly: the number or its logarithm")

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ConfigError(f"expected low < high, got {self.low:g} and {self.high:g}; swap or correct them", key="low")
        if self.scale == "log" and self.low <= 0:
            raise ConfigError(f"a logarithm needs low > 0, got {self.low:g}; raise it, or set scale to linear", key="low")

    def draw(self, random: Random) -> Number:
        """One number, with four significant digits unless it is whole."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        if whole and self.scale == "linear":
            return random.randint(int(self.low), int(self.high))
        u = random.random()
        value = self.low + u * (self.high - self.low) if self.scale == "linear" else self.low * (self.high / self.low) ** u
        return round(value) if whole else min(max(float(f"{value:.4g}"), self.low), self.high)


@dataclass
class Sweep:
    """The section `sweep:` of a configuration: what varies between its trials, and which of them go on."""

    metric: str = option(help="key of metrics.jsonl by which trials are compared; its newest line counts, a mean over training.log_every")
    best_is: Literal["lowest", "highest"] = option("lowest", "which value of the metric")
    choices: dict[str, list[Any]] = option(dict, "key of the configuration -> its values")
    ranges: dict[str, Range] = option(dict, "key of the configuration -> the range that its values are drawn from")
    trials: PositiveInt | None = option(None, "how many, drawn at random; left out: every combination of the choices")
    concurrent: PositiveInt | None = option(None, "trials that run at the same time; left out: as many as there is room for")
    grace: PositiveInt | None = option(
        None, "that every trial sees before it is compared with others and may be stopped early; left out: none is", unit="samples"
    )
    reduction: Annotated[float, Field(gt=1)] = option(
        4.0, "trials are compared at grace times its powers, and about one of so many goes on", source="ASHA, arXiv:1810.05934, 4.1"
    )
    seed: NonNegativeInt = option(0, "of what is drawn; each trial's own seed is that of the run")

    def __post_init__(self) -> None:
        keys = [*self.choices, *self.ranges]
        if not keys:
            raise ConfigError("nothing varies; name keys and their values, such as {optimizer.lr: [1e-4, 1e-3]}", key="choices")
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError("it has choices already; take it out of one of the two", key=f"ranges.{key}")
            if key.partition(".")[0] in _FIXED:
                raise ConfigError(
                    "it is the same for all trials; vary another key", key=f"{'choices' if key in self.choices else 'ranges'}.{key}"
                )
        for key, values in self.choices.items():
            if not values:
                raise ConfigError("a list of values is empty; name some", key=f"choices.{key}")
        if self.trials is None and self.ranges:
            raise ConfigError("ranges have no end of combinations; say how many trials", key="trials")
        count = self.trials or math.prod(map(len, self.choices.values()))
        if count > MAX_TRIALS:
            raise ConfigError(f"{count:,} trials are more than {MAX_TRIALS:,}; set fewer", key="trials")

    def drawn(self) -> list[dict[str, Any]]:
        """Key -> value, of each trial. Those of a trial depend on the seed and its number only, so that more may be asked for later."""
        if self.trials is None:
            return [dict(zip(self.choices, values, strict=True)) for values in itertools.product(*self.choices.values())]
        return [
            {key: values[_random(self.seed, number, key).randrange(len(values))] for key, values in self.choices.items()}
            | {key: values.draw(_random(self.seed, number, key)) for key, values in self.ranges.items()}
            for number in range(self.trials)
        ]

    def rungs(self, samples: int) -> list[int]:
        """The samples, short of `samples`, at which a trial is compared with the others."""
        rungs: list[int] = []
        while self.grace is not None and (rung := math.ceil(self.grace * self.reduction ** len(rungs))) < samples:
            rungs.append(rung)
        return rungs

    @property
    def logged(self) -> str:
        """The key that every line of metrics must have."""
        return self.metric

    def value(self, run: RunConfig) -> float | None:
        """Of a trial that has published a checkpoint, to be compared."""
        return (last_record(run.directory / METRICS) or {}).get(self.metric)

    def given_up(self, values: Sequence[float]) -> bool:
        """Whether a trial ends early whatever the others do, by its own values so far."""
        return False

    def better(self, value: float) -> float:
        """The larger, the better."""
        return value if self.best_is == "highest" else -value


def _random(seed: int, number: int, key: str) -> Random:
    return Random(derive(seed, "trial", number, key))


@dataclass(frozen=True)
class Trial:
    """One run of a sweep, in the directory trials/<name> of the sweep's."""

    name: str
    parameters: dict[str, Any]  # key of the configuration -> value
    run: RunConfig


@dataclass(frozen=True)
class LoadedSweep:
    """A sweep as configured, its trials built and checked."""

    settings: Sweep
    directory: Path
    trials: list[Trial]
    config: dict[str, Any]  # the whole configuration in plain values, interpolations resolved
    dependent: list[str]  # keys that interpolations take from what varies, so that the trials do not follow from `config`


def is_sweep(path: str | Path, overrides: Iterable[str] = ()) -> bool:
    """Whether the file has a section `sweep:`. Raises ConfigError when it cannot be read."""
    return "sweep" in load(path, overrides, {"output": ""}).values


def load_sweep(path: str | Path, overrides: Iterable[str] = ()) -> LoadedSweep:
    """Reads a run with a section `sweep:`; its directory is runs/<file name> unless it says otherwise.

    Raises ConfigError, also for what only one trial has.
    """
    path, overrides = Path(path), list(overrides)
    default = {"output": f"runs/{path.stem}"}
    document = load(path, overrides, default)
    if "sweep" not in document.values:
        raise document.error("sweep", "nothing says what varies; add a section `sweep:` (docs/sweeps.md), or use gentrain train")
    if "stages" in document.values:
        raise document.error("sweep", "a sweep is of one run, and this is a recipe; name the run's file")
    settings = build(_Section, Document({"sweep": document.values["sweep"]}, document.file, document.origins)).sweep
    directory = Path(str(document.values["output"]))
    trials: list[Trial] = []
    dependent: set[str] = set()
    for number, parameters in enumerate(settings.drawn()):
        name = f"{number:03d}"
        sets = [f"{key}={json.dumps(value)}" for key, value in parameters.items()]
        own = load(path, [*overrides, *sets], default)
        dependent.update(changed_keys(load(None, sets, document.values).values, own.values))
        del own.values["sweep"]
        own.values["output"] = str(directory / TRIALS / name)
        try:
            run = parse_run(own)
        except ConfigError as error:
            raise ConfigError(f"trial {name} ({shown(parameters)}): {error.message}", source=error.source, key=error.key) from None
        trials.append(Trial(name, parameters, run))
    _check(settings, trials, document)
    first = trials[0].run
    config = {**document.values, "sweep": to_dict(settings), "plugins": first.plugins, "cluster": to_dict(first.cluster)}
    return LoadedSweep(settings, directory, trials, config, sorted(dependent))


@dataclass
class _Section:
    sweep: Sweep = option()


def _check(settings: Sweep, trials: list[Trial], document: Document) -> None:
    for trial in trials:
        training = trial.run.training
        if training.checkpoints is not None:
            raise document.error("training.checkpoints", "all trials would share it; leave it out")
        first = min(settings.grace or training.samples, training.samples)
        if training.log_every > first:
            raise document.error("training.log_every", f"nothing is logged within {first:,} samples, the first that count; lower it")


def shown(parameters: Mapping[str, Any]) -> str:
    """optimizer.lr=0.001, seed=2"""
    return ", ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in parameters.items())


# --- the record -------------------------------------------------------------------------------------------------------------


class TrialRecord(TypedDict):
    """What has become of a trial. `rungs`: (samples, value of the metric) each time that it was compared, and at its end."""

    parameters: dict[str, Any]
    status: Status
    rungs: list[tuple[int, float]]
    error: NotRequired[str]


class Record(TypedDict):
    """sweep.json. `settings`: what the comparison of trials depends on."""

    settings: dict[str, Any]
    trials: dict[str, TrialRecord]


_RECORD = TypeAdapter(Record)


def read_record(directory: Path) -> Record:
    """sweep.json of a sweep's directory. Raises FileNotFoundError, and ConfigError when it is damaged."""
    try:
        return _RECORD.validate_json((directory / SWEEP).read_bytes())
    except ValueError as error:
        raise ConfigError("damaged; restore it, or move the directory away to begin anew", source=str(directory / SWEEP)) from error


class Journal:
    """Keeps sweep.json: written whole after every change, so that a sweep that is killed goes on from it."""

    def __init__(self, sweep: LoadedSweep):
        """Goes on from what is there. Raises ConfigError when that is of other settings."""
        self._sweep, self._path = sweep, sweep.directory / SWEEP
        whole = to_dict(sweep.settings)
        settings = {key: whole[key] for key in ("metric", "best_is", "grace", "reduction")}
        fresh = {trial.name: TrialRecord(parameters=trial.parameters, status="waiting", rungs=[]) for trial in sweep.trials}
        self.record = Record(settings=settings, trials=fresh)
        try:
            before = read_record(sweep.directory)
        except FileNotFoundError:
            self._write()
            return
        changed = changed_keys(before["settings"], settings)
        for name, trial in before["trials"].items():
            if name not in fresh or fresh[name]["parameters"] != trial["parameters"]:
                changed.append(f"trial {name}")
        if changed:
            raise ConfigError(
                f"{sweep.directory} holds a sweep with another {', '.join(changed[:3])}; only `trials` may grow. Name another directory "
                "with output=..., or move that one away",
                key="output",
            )
        self.record["trials"] |= before["trials"]

    def unfinished(self) -> list[Trial]:
        """The trials that have not come to an end, or died of something that another attempt may not meet."""
        return [trial for trial in self._sweep.trials if self.of(trial.name)["status"] in ("waiting", "running", "failed")]

    def of(self, name: str) -> TrialRecord:
        return self.record["trials"][name]

    def note(self, name: str, status: Status, rung: tuple[int, float] | None = None, error: str | None = None) -> None:
        trial = self.of(name)
        trial["status"] = status
        if rung is not None:
            trial["rungs"].append(rung)
        trial.pop("error", None)
        if error is not None:
            trial["error"] = error
        self._write()
        if status != "running" or rung is not None:
            told = "" if rung is None else f" at {rung[0]:,} samples: {self._sweep.settings.metric} {short(rung[1])}"
            what = "goes on" if status == "running" else status
            log.info("trial %s (%s) %s%s%s", name, shown(trial["parameters"]), what, told, f": {error}" if error else "")

    def pause(self) -> None:
        """No trial is running (any more)."""
        for trial in self.record["trials"].values():
            if trial["status"] == "running":
                trial["status"] = "waiting"
        self._write()

    def ranking(self) -> list[str]:
        """Names of trials, the best first: those that have seen more samples before others, since a loss falls with them."""
        better = self._sweep.settings.better

        def merit(name: str) -> tuple[float, float]:
            samples, value = (self.of(name)["rungs"] or [(0, math.nan)])[-1]
            return (-samples, -better(value) if math.isfinite(value) else math.inf)

        return sorted(self.record["trials"], key=merit)

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._path, json.dumps(self.record, indent=1))
