"""The stage `train_best`."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt
from safetensors.torch import load_file
from torch import Tensor

from gentrain.cluster.sweeps import TRIALS, Journal, LoadedSweep, Sweep, Trial, shown
from gentrain.cluster.tune import run_sweep, run_trial
from gentrain.config import ConfigError, Document, build, load, option, register, to_dict
from gentrain.data.base import Data
from gentrain.data.pool import INFO, SAMPLES
from gentrain.metrics.base import Metric
from gentrain.metrics.chamfer import chamfer_distance
from gentrain.metrics.distances import distance_metric, energy_distance, frechet_distance
from gentrain.recipes.base import Stage, Stopped, share_of
from gentrain.recipes.evaluate import load_judge, read_held_out, write_metrics
from gentrain.recipes.features import apply_network
from gentrain.recipes.generate import Generate
from gentrain.recipes.likelihood import Likelihood
from gentrain.recipes.train import plain
from gentrain.samplers.base import Sampler
from gentrain.training.checkpoint import manifest
from gentrain.training.run import CHECKPOINTS, RunConfig, open_run, parse_run, save_config
from gentrain.training.settings import weight_settings
from gentrain.training.storage import LocalStorage

log = logging.getLogger(__name__)

PROMOTION = "promotion.json"
_DISTANCES = {"frechet": frechet_distance, "energy": energy_distance, "chamfer": chamfer_distance}
By = Literal["frechet", "energy", "chamfer"]


@dataclass
class Contest(Sweep):
    """A sweep whose trials are compared by how far samples of their averaged weights lie from held-out data, and stop by their own past.

    All are drawn with the same noise and labels, so that their distances, which depend on the number of samples, can be compared.
    """

    every: int = 1  # samples of the run between comparisons
    patience: int = 1
    count: int = 2_000
    seed: int = 0
    actors: int = 0
    by: By = "energy"
    judge: str | None = None
    data: dict[str, Any] | None = None  # this and the sampler in plain values: their classes may be of a plugin, which the run loads
    sampler: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.choices:
            super().__post_init__()

    @property
    def logged(self) -> str:
        return "samples"

    def rungs(self, samples: int) -> list[int]:
        return list(range(self.every, samples, self.every))

    def given_up(self, values: Sequence[float]) -> bool:
        """Whether the nearest of a trial's values lies `patience` comparisons back."""
        return len(values) - 1 - min(range(len(values)), key=lambda number: values[number]) >= self.patience

    def value(self, run: RunConfig) -> float | None:
        """Of the run's newest checkpoint; its samples are kept, and not drawn again."""
        drawn = run.directory / "drawn" / str(run.storage.latest())
        if not (drawn / INFO).is_file():
            sampler = None if self.sampler is None else build(Sampler, Document(self.sampler, "sampler"))
            Generate(str(run.directory), self.count, sampler=sampler, seed=self.seed, actors=self.actors).execute(drawn)
        try:
            return _DISTANCES[self.by](*self.compared(drawn, run.data))
        except ValueError as error:
            raise ConfigError(str(error), key="count") from error

    def compared(self, drawn: Path, data: Data) -> tuple[Tensor, Tensor]:
        """What is compared of samples and of held-out data: they themselves, or the judge's features of them, [N, D] each."""
        data = data if self.data is None else build(Data, Document(self.data, "data"))
        both = load_file(drawn / SAMPLES)["x"], read_held_out(data, self.count)["x"]
        if self.judge is not None:
            judge, _ = load_judge(self.judge, data)
            both = apply_network(judge.features, both[0]), apply_network(judge.features, both[1])
        return both[0].flatten(1), both[1].flatten(1)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint of a run, with the distance of its samples."""

    run: Path
    checkpoint: str
    value: float

    @property
    def drawn(self) -> Path:
        return self.run / "drawn" / self.checkpoint


@register("train_best")
@dataclass
class TrainBest(Stage):
    """Trains a run, or one for each combination of some values, and makes the best checkpoint a run of its own, for later stages to take.

    Every training.checkpoint_every samples a trial draws from the average of its weights. The best checkpoint is the one whose samples are
    nearest to held-out data, of all trials and of the run that they began with; a trial that comes no nearer ends early. promotion.json has
    all distances, metrics.json those of the best and of the beginning, corrected and with intervals, and what it cost in likelihood.
    """

    run: RunConfig = option(help="the run; `base:` names its file")
    choices: dict[str, list[Any]] = option(
        dict, "key of the run -> its values: a trial for each combination, such as {method.alpha: [1, 4]}; none = one trial"
    )
    concurrent: NonNegativeInt | None = option(
        0, "trials that run at the same time under Ray Tune; null = as many as there is room for; 0 = one after the other, without Tune"
    )
    patience: PositiveInt = option(1, "a trial ends after so many comparisons in a row without coming nearer than it was")
    before: str | None = option(None, "the run that the trials begin with, which competes and stays the best where none is better")
    judge: str | None = option(None, "run of the method `classifier`; null = compare the samples themselves")
    by: By | None = option(
        None, "distance, of the judge's penultimate features where there is one; null = frechet with a judge, energy without"
    )
    data: Data | None = option(None, "what to compare with; null = the run's")
    count: PositiveInt = option(2_000, "samples of each checkpoint, and held-out items at most", unit="samples")
    sampler: Sampler | None = option(None, "null = the run's")
    seed: NonNegativeInt = option(0, "of the noise, the same for all: another one than that of the final samples")
    actors: NonNegativeInt = option(
        0, "size of the Ray fleet that draws when a trial is compared; 0 = the process that trains it, or launches it"
    )
    likelihood: NonNegativeInt = option(0, "held-out items whose likelihood before and after is told; 0 = none", unit="samples")
    levels: Annotated[int, Field(ge=2)] | None = option(None, "of the data, for their likelihood: see the stage `likelihood`")

    def __post_init__(self) -> None:
        if self.patience >= self.run.training.keep_last:
            raise ConfigError(
                f"the best checkpoint may lie {self.patience} comparisons back when a trial ends; keep at least {self.patience + 1}",
                key="run.training.keep_last",
            )
        if self.actors and self.concurrent != 0 and self.run.cluster.place == "inline":
            raise ConfigError(
                "a trial under Ray Tune holds its core while it draws, which the fleet may wait for; set it to 0", key="actors"
            )
        self._trials = self._sweep(Path(self.run.output)).trials  # what is wrong with one is told as the recipe loads

    @property
    def trained(self) -> RunConfig:
        return self.run

    @property
    def under_ray(self) -> bool:
        return self.concurrent != 0 or super().under_ray

    @property
    def held(self) -> str:
        tune = self.concurrent != 0 and self.run.cluster.place == "inline"
        each = f"an actor of Ray Tune with {share_of(self.run.cluster)}" if tune else super().held
        each += f", and between its trainings a fleet of at most {self.actors} actors" if self.actors else ""
        known = {0: "one after the other", None: "as many at a time as there is room for"}
        together = known.get(self.concurrent, f"{self.concurrent} at a time")
        return each if len(self._trials) == 1 else f"{len(self._trials)} trials, {together}, each: {each}"

    def place(self, directory: Path) -> None:
        self.run.output = str(directory)

    def settings(self) -> dict[str, Any]:
        values = super().settings()
        del values["concurrent"], values["actors"]
        values["run"] = plain(self.run, weight_settings(self.run))
        values["every"] = self.run.training.checkpoint_every
        return values

    def execute(self, directory: Path) -> None:
        sweep = self._sweep(directory)
        contest, journal = sweep.settings, self._train(sweep)
        assert isinstance(contest, Contest)
        found: dict[str, Candidate] = {}
        if self.before is not None:
            found["before"] = self._beginning(contest, directory / "before")
        for trial in sweep.trials:
            for samples, value in journal.of(trial.name)["rungs"]:
                label = f"{shown(trial.parameters) or 'trained'} at {samples}"
                found[label] = Candidate(trial.run.directory, f"{samples:012d}", value)
        if len(found) == (self.before is not None):
            why = "; ".join(f"{trial.name}: {journal.of(trial.name).get('error')}" for trial in sweep.trials)
            log.warning("no trial came to its first comparison (%s)", why)
        if not found:
            raise RuntimeError(f"no trial of {directory} came to its first comparison; its sweep.json says why")
        best = min(found, key=lambda label: found[label].value)
        log.info("%s is the best: %s distance %.4g", best, contest.by, found[best].value)
        copy_run(found[best].run, found[best].checkpoint, directory)
        told = dict.fromkeys(["before", best] if self.before is not None else [best])
        metrics = [self._distance(contest, label, found[label]) for label in told]
        metrics += [metric for label in told for metric in self._likelihood(label, found[label].run if label != best else directory)]
        settings = {"best": best, "before": self.before, "trials": {each.name: shown(each.parameters) for each in sweep.trials}}
        write_metrics(directory, metrics, settings)
        distances = {label: each.value for label, each in found.items()}
        (directory / PROMOTION).write_text(json.dumps({"by": contest.by, "promoted": best, "distances": distances}, indent=1))
        for label in found.keys() - told.keys():
            shutil.rmtree(found[label].drawn, ignore_errors=True)

    def _train(self, sweep: LoadedSweep) -> Journal:
        """Raises Stopped when asked to stop, and what keeps a trial from being trained."""
        if self.concurrent == 0:
            for number in range(len(sweep.trials)):
                if run_trial(sweep, number) == "waiting":
                    raise Stopped
        journal = Journal(sweep) if self.concurrent == 0 else run_sweep(sweep)
        left = {trial.name: journal.of(trial.name) for trial in journal.unfinished()}
        if any(trial["status"] == "waiting" for trial in left.values()):
            raise Stopped
        if left:
            why = "; ".join(f"{name}: {trial.get('error')}" for name, trial in left.items())
            raise RuntimeError(f"trials of {sweep.directory} failed ({why}); run the recipe again to go on with them")
        return journal

    def _sweep(self, directory: Path) -> LoadedSweep:
        by = self.by or ("energy" if self.judge is None else "frechet")
        contest = Contest(
            metric=f"{by} distance", choices=self.choices, concurrent=self.concurrent, every=self.run.training.checkpoint_every,
            patience=self.patience, count=self.count, seed=self.seed, actors=self.actors, by=by, judge=self.judge,
            data=None if self.data is None else to_dict(self.data), sampler=None if self.sampler is None else to_dict(self.sampler),
        )  # fmt: skip
        trials = []
        for number, parameters in enumerate(contest.drawn()):
            name = f"{number:03d}"
            values = plain(self.run, to_dict(self.run)) | {"output": str(directory / TRIALS / name)}
            document = load(None, [f"{key}={json.dumps(value)}" for key, value in parameters.items()], values)
            try:
                trials.append(Trial(name, parameters, parse_run(document)))
            except ConfigError as error:
                what = f"trial {name} ({shown(parameters)}): {error.message}"
                raise ConfigError(what, source=None, key=f"run.{error.key}") from None
        return LoadedSweep(contest, directory, trials, {}, [])

    def _beginning(self, contest: Contest, place: Path) -> Candidate:
        assert self.before is not None
        name = open_run(self.before, "before").storage.latest()
        if name is None:
            raise ConfigError(f"{self.before} has no checkpoint yet; train it first", key="before")
        copy_run(self.before, name, place)
        value = contest.value(open_run(place))
        assert value is not None
        return Candidate(place, name, value)

    def _distance(self, contest: Contest, label: str, candidate: Candidate) -> Metric:
        smooth = "energy" if contest.by == "chamfer" else contest.by  # of nearest neighbours there is no bootstrap
        features, real = contest.compared(candidate.drawn, open_run(candidate.run).data)
        what = "what the trials began with" if label == "before" else "the best"
        return distance_metric(f"{smooth} distance, {label}", _DISTANCES[smooth], features, real, what)

    def _likelihood(self, label: str, run: Path) -> list[Metric]:
        if not self.likelihood:
            return []
        metrics, _ = Likelihood(str(run), self.likelihood, self.levels).measure()
        return [replace(metric, name=f"{metric.name}, {label}") for metric in metrics]


def copy_run(source: str | Path, checkpoint: str, target: Path) -> None:
    """Makes `target` a run of the configuration of `source` with that checkpoint alone."""
    run = open_run(source)
    storage, copies = run.storage, LocalStorage(target / CHECKPOINTS)
    copies.prepare(checkpoint)
    with storage.open(checkpoint) as opened:
        for name in opened.hashes:
            copies.put(checkpoint, name, lambda path, name=name: shutil.copyfile(opened.file(name), path))  # type: ignore[misc]
        copies.publish(checkpoint, manifest(opened.hashes))
    run.output, run.training.checkpoints = str(target), None
    save_config(run)
