"""The stage `evaluate`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gentrain.config import ConfigError, option, register, to_dict
from gentrain.data.base import Data
from gentrain.data.loader import Loader
from gentrain.methods.base import Trained
from gentrain.metrics.accuracy import class_accuracy
from gentrain.metrics.base import Metric, bootstrap_interval
from gentrain.metrics.distances import distance_metric, energy_distance, frechet_distance, kernel_metric, sliced_wasserstein
from gentrain.metrics.features import Features
from gentrain.metrics.neighbours import neighbour_metrics
from gentrain.models.adapters import digest_of
from gentrain.recipes.adopt import Adopt
from gentrain.recipes.base import Stage
from gentrain.recipes.controls import condition_error
from gentrain.recipes.features import FeatureSource, apply_network
from gentrain.recipes.generate import INFO, SAMPLES, Generate
from gentrain.training.roles import load_network, load_weights
from gentrain.training.run import open_run

log = logging.getLogger(__name__)

METRICS = "metrics.json"
NEIGHBOURS = 5  # balls reach up to this one


@register("evaluate")
@dataclass
class Evaluate(Stage):
    """Compares sets of samples with held-out data: metrics.json.

    With a judge (a trained classifier run): class accuracy, and its own accuracy on the held-out data, which comes last. Of `features`, or
    of the judge's penultimate ones: the Frechet and the kernel distance, precision, recall, density and coverage. With neither: sliced
    Wasserstein and energy distance, precision, recall, density and coverage of the samples themselves. Of samples that were drawn for
    controls also the condition error.
    """

    samples: dict[str, str] = option(help="name -> directory of a generate stage")
    judge: str | None = option(None, "run of the method `classifier`; null = no class accuracy")
    features: Features | None = option(None, "network whose features are compared; null = the judge, without one the samples themselves")
    data: Data | None = option(None, "what to compare with; null = the judge's data")
    reference: PositiveInt = option(10_000, "held-out items to compare with, at most", unit="samples")
    baseline: str | None = option(
        None, "name of the samples whose Frechet distance is taken from that of each other, with the interval of that"
    )
    actors: NonNegativeInt = option(0, "size of the Ray fleet that reads features; 0 = in this process, without Ray")

    def __post_init__(self) -> None:
        if not self.samples:
            raise ConfigError("expected at least one name: directory of a generate stage", key="samples")
        if self.baseline is not None and self.baseline not in self.samples:
            raise ConfigError(f"no samples of that name; choose one of {', '.join(self.samples)}", key="baseline")
        if self.baseline is not None and len(self.samples) == 1:
            raise ConfigError("these are the only samples; name others beside them, or leave it out", key="baseline")
        if self.baseline is not None and self.judge is None and self.features is None:
            raise ConfigError("only distances of features are compared; name a judge or features, or leave it out", key="baseline")
        if self.judge is None and self.data is None:
            raise ConfigError("without a judge `data` is needed, to know what to compare the samples with", key="data")

    def check(self, places: Mapping[Path, Stage]) -> None:
        refuse_runs(places, {f"samples.{name}": place for name, place in self.samples.items()})
        if self.judge is not None:
            judged_classes(places, self.judge)

    def settings(self) -> dict[str, Any]:
        values = super().settings()
        del values["actors"]
        return values

    def execute(self, directory: Path) -> None:
        data = self.data or open_run(str(self.judge)).data
        held_out = read_held_out(data, self.reference)
        judge = load_judge(self.judge, self.data)[0] if self.judge is not None else None
        metrics = self._without_features(held_out) if judge is None and self.features is None else self._with_features(judge, held_out)
        metrics += [metric for name, place in self.samples.items() for metric in condition_error(name, place, judge)]
        settings = {key: value for key, value in to_dict(self).items() if key in ("judge", "features", "samples")}
        settings |= {"reference": f"{len(held_out['x'])} held-out items"}
        settings |= {"weights": {name: digest for name, place in self.samples.items() if (digest := weights_of(place)) is not None}}
        write_metrics(directory, [self._told(metric) for metric in metrics], settings)

    def _told(self, metric: Metric) -> Metric:
        """With how the samples were drawn, where that is recorded: the numbers are of that sampler, not of the model alone."""
        for name, place in self.samples.items():
            info = Path(place) / INFO
            if metric.name.endswith(f", {name}") and info.is_file() and (drawn := json.loads(info.read_text()).get("drawn")):
                return replace(metric, definition=f"{metric.definition}; drawn with {drawn}")
        return metric

    def _with_features(self, judge: Any, held_out: dict[str, Tensor]) -> list[Metric]:
        metrics, read_of = [], {}
        sets = read_samples(self.samples, held_out["x"].shape[1:])
        self._refuse_other_counts({name: len(samples["x"]) for name, samples in sets})
        if self.features is not None:
            self._refuse_shape(held_out["x"].shape[1:])
        try:
            source = FeatureSource(self.judge, self.features, self.actors)
        except ValueError as error:
            raise ConfigError(str(error), key="features") from error
        real = source.read_once(held_out["x"])
        kind, whose = (self.features, self.features.told) if self.features is not None else (Features, "the judge's")
        of = f"of {whose} {real.shape[1]} features"
        for name, samples in sets:
            if judge is not None and (samples["label"] >= 0).any():  # they were drawn of some class
                metrics.append(class_accuracy(apply_network(judge, samples["x"]).argmax(1), samples["label"], f"class accuracy, {name}"))
            features = source.read(samples["x"])
            if min(len(features), len(real)) > real.shape[1]:
                read_of[name] = features
                metrics.append(distance_metric(f"{kind.frechet}, {name}", frechet_distance, features, real, of))
            else:
                self._too_few(name, len(features), *real.shape)
            metrics.append(kernel_metric(f"{kind.kernel}, {name}", features, real, of))
            metrics += neighbour_metrics(features, real, name, of, NEIGHBOURS)
        if self.baseline in read_of:
            metrics += self._differences(read_of, real, kind.frechet)
        if judge is None:
            return metrics
        read = apply_network(judge, held_out["x"]).argmax(1)
        return [*metrics, class_accuracy(read, held_out["label"], "accuracy of the judge on held-out data")]

    def _differences(self, features: dict[str, Tensor], real: Tensor, what: str) -> list[Metric]:
        """Of equal numbers the i-th of both sets are drawn again together: where they share noise and label most of the spread goes."""
        dim, metrics, base = real.shape[1], [], str(self.baseline)

        def difference(pairs: Tensor, real: Tensor) -> float:
            return frechet_distance(pairs[:, :dim], real) - frechet_distance(pairs[:, dim:], real)

        for name, of in features.items():
            if name != base:
                found = bootstrap_interval(difference, torch.cat([of, features[base]], 1), real)
                definition = f"below 0: {name} is nearer to the held-out data than {base}; paired bootstrap interval"
                metrics.append(Metric(f"{what}, {name} minus {base}", *found, "lower", definition))
        return metrics

    def _refuse_other_counts(self, counts: dict[str, int]) -> None:
        for name, count in counts.items():
            if self.baseline is not None and count != counts[self.baseline]:
                raise ConfigError(f"{count} samples, and {counts[self.baseline]} of {self.baseline}; draw as many", key=f"samples.{name}")

    def _refuse_shape(self, shape: torch.Size) -> None:
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ConfigError(f"it reads images with 1 or 3 channels, these samples have the shape {list(shape)}", key="features")

    def _too_few(self, name: str, drawn: int, held_out: int, entries: int) -> None:
        """Raises ConfigError of a judge; pretrained networks may have more features than there are held-out items."""
        told = (
            f"{drawn} samples and {held_out} held-out items are too few for the Frechet distance of {entries} features: "
            "it takes more than that of each"
        )
        if self.features is None:
            raise ConfigError(f"{told}; draw count={5 * entries} or more", key=f"samples.{name}")
        log.warning("left out, %s: %s", name, told)

    def _without_features(self, held_out: dict[str, Tensor]) -> list[Metric]:
        real, metrics = held_out["x"].flatten(1), []
        for name, samples in read_samples(self.samples, held_out["x"].shape[1:]):
            x = samples["x"].flatten(1)
            metrics.append(distance_metric(f"sliced Wasserstein, {name}", sliced_wasserstein, x, real, "of the samples"))
            metrics.append(distance_metric(f"energy distance, {name}", energy_distance, x, real, "of the samples"))
            if min(len(x), len(real)) > NEIGHBOURS:
                metrics += neighbour_metrics(x, real, name, "of the samples", NEIGHBOURS)
        return metrics


def weights_of(samples: str | Path) -> str | None:
    """The digest of the weights that drew the samples in a directory, None where it is not told."""
    path = Path(samples) / INFO
    if not path.is_file():
        return None
    try:
        digest = json.loads(path.read_bytes()).get("weights")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"damaged ({error}); draw the samples again", source=str(path)) from error
    return digest if isinstance(digest, str) else None


def measured_weights(directory: str | Path) -> dict[str, str]:
    """Name of each set of samples that an evaluate stage measured -> the digest of the weights that drew it, where that was told."""
    try:
        told = json.loads((Path(directory) / METRICS).read_bytes())["settings"].get("weights", {})
        return {name: digest for name, digest in told.items() if isinstance(digest, str)}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"no table of metrics ({error}); evaluate again", source=str(Path(directory) / METRICS)) from error


def refuse_former_weights(run: Path, drew: str | None, what: str) -> None:
    """Raises ConfigError where weights of the digest `drew` are not those of the run's newest checkpoint."""
    if drew is not None and drew != digest_of(load_weights(str(run))):
        remedy = f"draw and measure anew: gentrain sample {run}, gentrain evaluate {run}"
        raise ConfigError(f"{what} of other weights than the run's newest checkpoint; {remedy}", source=str(run))


def own_samples(run: Path, place: Path) -> str:
    """The directory of a run's samples. Raises ConfigError for a run that draws none, and for samples of former weights."""
    method = open_run(run).method
    if method.generator is None:
        other = {"classifier": "name it as the judge of a generator's run", "contrastive": "measure it with the stage `retrieval`"}
        remedy = other.get(method.registered_name, "name a generator's run")
        raise ConfigError(f"{run} holds a {method.registered_name}, which draws nothing that could be compared; {remedy}")
    refuse_former_weights(run, weights_of(place), f"{place} holds samples")
    return str(place)


def judged_classes(places: Mapping[Path, Stage], judge: str) -> list[str] | None:
    """The classes that a judge tells apart which another stage trains, None where no stage says. Raises ConfigError for what is none."""
    stage = places.get(Path(judge).absolute())
    if isinstance(stage, Generate):
        raise ConfigError(f"{judge} will hold samples; name a run of the method `classifier`", key="judge")
    if stage is None or (run := stage.trained) is None:
        return None
    if not any(isinstance(each, Trained) and each.classifier for each in run.method.roles.values()):
        raise ConfigError(f"{judge} will be a run of {run.method.registered_name}; a judge is one of `classifier`", key="judge")
    return None if run.data.to_come else list(run.data.class_names)


def refuse_runs(places: Mapping[Path, Stage], samples: Mapping[str, str]) -> None:
    """Raises ConfigError where another stage makes a run of what should be samples; key -> directory."""
    for key, place in samples.items():
        stage = places.get(Path(place).absolute())
        if stage is not None and (stage.trained is not None or isinstance(stage, Adopt)):
            told = f"{place} will be a run, that of a stage `{stage.registered_name}`, and no samples"
            raise ConfigError(f"{told}; name the directory of a stage `generate` that draws from it", key=key)


def load_judge(directory: str, data: Data | None) -> tuple[Any, Data]:
    """A judge's network and `data`, or the data that it was trained on. Raises ConfigError when it cannot judge samples of `data`."""
    judge, run = load_network(directory)
    if not hasattr(judge, "features"):
        raise ConfigError(f"{directory} is a run of {run.method.registered_name}; a judge is one of `classifier`", key="judge")
    data = data or run.data
    ours, theirs = ((each.shape, list(each.class_names)) for each in (data, run.data))
    if ours != theirs:
        raise ConfigError(
            f"{directory} judges samples of shape {theirs[0]} and the classes {', '.join(theirs[1])}; these are of shape {ours[0]} "
            f"and the classes {', '.join(ours[1]) or 'none'}; train a judge on their data",
            key="judge",
        )
    return judge, data


def read_samples(places: dict[str, str], shape: torch.Size, key: str = "samples.{}") -> list[tuple[str, dict[str, Tensor]]]:
    """Name and contents of each set of samples. Raises ConfigError, about `key` of the name, for what are no samples of `shape`."""
    found = []
    for name, place in places.items():
        path, where = Path(place) / SAMPLES, key.format(name)
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; draw the samples first (gentrain sample RUN, or a stage `generate`)", key=where)
        try:
            samples = load_file(path)
            x, label = samples["x"], samples["label"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error}); generate it again", key=where) from error
        fits = x.dtype == torch.float32 and x.shape[1:] == shape and label.dtype == torch.int64
        if not fits or label.shape != x.shape[:1] or not len(x) or not x.isfinite().all():
            what = f"x {x.dtype} {list(x.shape)}, label {label.dtype} {list(label.shape)}"
            expected = f"finite float32 samples of shape {list(shape)} with an int64 label each"
            raise ConfigError(f"{path} holds {what}; expected {expected}; generate it again", key=where)
        found.append((name, samples))
    return found


def read_held_out(data: Data, count: int) -> dict[str, Tensor]:
    """At most `count` held-out items, stacked."""
    items = data.split("held_out")
    return next(iter(Loader(items, seed=0, batch_size=min(len(items), count))))[0]


def write_metrics(directory: Path, metrics: list[Metric], settings: dict[str, Any]) -> None:
    """What a stage measured, and how: the table that the report and model cards show."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / METRICS).write_text(json.dumps({"metrics": [asdict(metric) for metric in metrics], "settings": settings}, indent=1))


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """What an evaluate stage measured, as plain mappings. Raises ConfigError when its file is missing or damaged."""
    path = Path(directory) / METRICS
    try:
        return [asdict(metric) for metric in TypeAdapter(list[Metric]).validate_python(json.loads(path.read_bytes())["metrics"])]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"no table of metrics ({str(error).splitlines()[0]}); evaluate again", source=str(path)) from error
