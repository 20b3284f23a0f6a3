"""The stage `unlearning`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from gentrain.config import ConfigError, Fraction, option, register, to_dict
from gentrain.images import save_grid
from gentrain.methods.forgetting import class_number
from gentrain.metrics.base import Metric
from gentrain.metrics.unlearning import forget_accuracy, override_rate, remain_accuracy, remain_distance
from gentrain.models.adapters import digest_of
from gentrain.recipes.base import Stage
from gentrain.recipes.evaluate import load_judge, read_held_out, read_samples, write_metrics
from gentrain.recipes.features import apply_network, cached_features
from gentrain.recipes.generate import GRID, INFO
from gentrain.recipes.oracle import oracle_distances
from gentrain.training.roles import load_weights

RELEASE = "release.json"
_SHOWN = 3  # images of a class and a model in the grid
NO_GUARANTEE = (
    "These numbers are of one judge, these samples and this way of asking. They are no guarantee: other inputs, an attack on them, or a "
    "short fine-tuning may bring the class back."
)


class Check(TypedDict):
    """One condition of a release."""

    what: str
    measured: float
    limit: float
    met: bool


class Release(TypedDict):
    """What a stage `unlearning` found of the weights with digest `weights`."""

    forget: str
    weights: str
    checks: list[Check]


_RELEASE = TypeAdapter(Release)


@dataclass
class Gate:
    """What must hold before a model that was made to forget is given away. Each limit meets the worse end of a 95 % interval."""

    forget: Fraction = option(0.02, "greatest upper end of the interval of the forget accuracy")
    override: Fraction | None = option(None, "least lower end of the interval of the override rate; null = whatever it is")
    remain_loss: Fraction = option(0.0, "by how much the remain accuracy may lie below the lower end of the interval of `before`")
    distance_factor: PositiveFloat = option(1.0, "how many times the upper end of the distance of `before` that of `after` may be")
    distance_floor: NonNegativeFloat = option(0.0, "a Frechet distance that is always good enough, where that of `before` is near 0")


@register("unlearning")
@dataclass
class Unlearning(Stage):
    """Compares a model that was made to forget a class with the model before: metrics.json, release.json and, of images, grid.png.

    All samples are drawn with the same seed and labels, the forgotten class among them; fewer of some will do. The grid has a row for
    each class and, from left to right, the first images of `others`, `before` and `after`, each column of the same noise.
    """

    forget: int | str = option(help="the forgotten class, by number or name")
    judge: str = option(help="run of the method `classifier`, trained on all classes")
    before: str = option(help="directory of a generate stage: the model that still knows the class")
    after: str = option(help="directory of a generate stage: the model that has forgotten")
    others: dict[str, str] = option(dict, "name -> directory of further generate stages, measured alike (the teacher, baselines)")
    override: int | str | None = option(None, "the class drawn in its place; null = none in particular")
    gate: Gate = option(Gate, "what a release needs; `export` refuses what does not meet it")
    oracle: str | None = option(None, "run of a model that never knew the class, from which divergences are bounded; null = none")
    oracle_count: PositiveInt = option(200, "samples of the oracle on which that is done", unit="samples")
    oracle_draws: PositiveInt = option(8, "noise levels for each of them")
    reference: PositiveInt = option(10_000, "held-out items to compare with, at most", unit="samples")

    def execute(self, directory: Path) -> None:
        judge, data = load_judge(self.judge, None)
        forgotten, override = self._classes(list(data.class_names))
        held_out = read_held_out(data, self.reference)
        places = {**self.others, "before": self.before, "after": self.after}
        if len(places) != len(self.others) + 2:
            raise ConfigError("`before` and `after` are taken; use other names", key="others")
        sets = dict(read_samples(self.others, held_out["x"].shape[1:], "others.{}"))
        sets |= read_samples({"before": self.before, "after": self.after}, held_out["x"].shape[1:], "{}")
        self._refuse_other_noise(places, sets)
        real = cached_features(self.judge, judge, held_out["x"])
        measured: dict[str, list[Metric]] = {}
        for name, samples in reversed(sets.items()):  # what was asked for comes first
            read, features = apply_network(judge, samples["x"]).argmax(1), apply_network(judge.features, samples["x"])
            try:
                measured[name] = [
                    forget_accuracy(read, samples["label"], forgotten, f"forget accuracy, {name}"),
                    *([] if override is None else [override_rate(read, samples["label"], forgotten, override, f"override rate, {name}")]),
                    remain_accuracy(read, samples["label"], forgotten, f"remain accuracy, {name}"),
                    remain_distance(
                        features, samples["label"], real, held_out["label"], forgotten, f"Frechet distance of the others, {name}"
                    ),
                ]
            except ValueError as error:
                raise ConfigError(str(error), key=f"others.{name}" if name in self.others else name) from error
        release = self._release(str(data.class_names[forgotten]), measured, override is not None)
        if self.oracle is not None:
            runs = {name: str(_info(place).get("run")) for name, place in places.items()}
            for name, metric in oracle_distances(self.oracle, runs, forgotten, self.oracle_count, self.oracle_draws).items():
                measured[name].append(metric)
        settings = to_dict(self) | {"release": "met" if not unmet(release) else f"not met: {'; '.join(unmet(release))}"}
        settings["grid"] = f"A row for each class, {_SHOWN} samples of each model, from left to right: {', '.join(sets)}; the same noise."
        write_metrics(directory, [metric for metrics in measured.values() for metric in metrics], settings)
        (directory / RELEASE).write_text(json.dumps(release, indent=1))
        if held_out["x"].ndim == 4 and held_out["x"].shape[1] in (1, 3):
            _save_side_by_side(list(sets.values()), len(data.class_names), directory / GRID)

    def _classes(self, names: list[str]) -> tuple[int, int | None]:
        places = []
        for key, given in (("forget", self.forget), ("override", self.override)):
            try:
                places.append(None if given is None else class_number(given, names))
            except ValueError as error:
                raise ConfigError(str(error), key=key) from error
        if places[0] == places[1]:
            raise ConfigError("it is the forgotten class; name another one, or null", key="override")
        assert places[0] is not None
        return places[0], places[1]

    def _refuse_other_noise(self, places: dict[str, str], sets: dict[str, dict[str, Tensor]]) -> None:
        """Else a difference of the models could be one of the noise."""
        seeds = {name: _info(place).get("seed") for name, place in places.items()}
        for name, samples in sets.items():
            common = min(len(samples["label"]), len(sets["before"]["label"]))
            if not torch.equal(samples["label"][:common], sets["before"]["label"][:common]) or seeds[name] != seeds["before"]:
                key = f"others.{name}" if name in self.others else name
                raise ConfigError(
                    "these samples and those of `before` have other labels or seeds; draw both with the same labels and seed", key=key
                )

    def _release(self, forgotten: str, measured: dict[str, list[Metric]], overridden: bool) -> Release:
        (before, after), gate = (measured[name] for name in ("before", "after")), self.gate
        remain, distance = before[-2], before[-1]
        checks = [_check("forget accuracy, upper end", after[0].high, gate.forget, True)]
        if overridden and gate.override is not None:
            checks.append(_check("override rate, lower end", after[1].low, gate.override, False))
        checks.append(_check("remain accuracy", after[-2].value, remain.low - gate.remain_loss, False))
        farthest = max(gate.distance_factor * distance.high, gate.distance_floor)
        checks.append(_check("Frechet distance of the others", after[-1].value, farthest, True))
        return {"forget": forgotten, "weights": str(_info(self.after).get("weights", "")), "checks": checks}


def _check(what: str, measured: float, limit: float, below: bool) -> Check:
    return {"what": what, "measured": measured, "limit": limit, "met": measured <= limit if below else measured >= limit}


def _info(place: str) -> dict[str, Any]:
    try:
        return dict(json.loads((Path(place) / INFO).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{place}/{INFO} does not say how the samples were drawn ({error}); generate them again") from error


def _save_side_by_side(sets: list[dict[str, Tensor]], classes: int, path: Path) -> None:
    rows = []
    for label in range(classes):
        for number, samples in enumerate(sets):
            images = samples["x"][samples["label"] == label][:_SHOWN]
            blank = images.new_ones(_SHOWN - len(images) + (number + 1 < len(sets)), *samples["x"].shape[1:])  # a white column between
            rows += [images, blank]
    save_grid(torch.cat(rows), path, (_SHOWN + 1) * len(sets) - 1)


# --- what export makes of it ------------------------------------------------------------------------------------------------


def unmet(release: Release) -> list[str]:
    """The conditions that do not hold, each in words."""
    missed = [check for check in release["checks"] if not check["met"]]
    return [f"{check['what']} is {check['measured']:.4g}, the limit {check['limit']:.4g}" for check in missed]


def read_release(directory: str, run: str) -> Release:
    """What a stage `unlearning` found. Raises ConfigError when its file is missing, damaged, or about other weights than the run's."""
    path = Path(directory) / RELEASE
    try:
        release = _RELEASE.validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({str(error).splitlines()[0]}); run the stage `unlearning`", key="gate") from error
    if release["weights"] != digest_of(load_weights(run)):
        raise ConfigError(f"{path} is about other weights than those of {run}; draw from that run and measure again", key="gate")
    return release


def statement(forgotten: str, release: Release | None) -> str:
    """The model card's section: the class, the conditions with their numbers, and that they are no guarantee."""
    lines = [f"## Unlearning\nMade to forget the class {forgotten}.\n"]
    if release is None:
        return "\n".join([*lines, "Whether it did was not measured for this export, so nothing is claimed.\n", ""])
    missed = unmet(release)
    if missed:
        lines.append(f"**It does not meet the conditions of its release** ({'; '.join(missed)}) and was exported by force.\n")
    else:
        lines.append("It meets the conditions of its release.\n")
    lines += ["| condition | measured | limit | met |", "|---|---|---|---|"]
    for check in release["checks"]:
        lines.append(f"| {check['what']} | {check['measured']:.4g} | {check['limit']:.4g} | {'yes' if check['met'] else 'no'} |")
    return "\n".join([*lines, "", NO_GUARANTEE, "", ""])
