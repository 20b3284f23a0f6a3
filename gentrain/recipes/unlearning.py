"""The stage `unlearning`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
from gentrain.recipes.attacks import read_finding
from gentrain.recipes.base import Stage
from gentrain.recipes.evaluate import judged_classes, load_judge, read_held_out, read_samples, refuse_runs, write_metrics
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


class Attacked(TypedDict):
    """What an attack on the weights came to. [low, high] is the interval of `measured` that `definition` says."""

    what: str
    measured: float
    low: float
    high: float
    definition: str


class Release(TypedDict):
    """What a stage `unlearning` found of the weights with digest `weights`."""

    forget: str
    weights: str
    checks: list[Check]
    attacks: list[Attacked]


_RELEASE = TypeAdapter(Release)


_BETTER: dict[str, Literal["lower", "higher"]] = {"steps until relearnt": "higher", "success of inversion": "lower"}


@dataclass
class Measured:
    """Of one set of samples. forget, override: one for each forgotten class; further: in what the table adds."""

    forget: list[Metric]
    override: list[Metric]
    remain: Metric
    distance: Metric
    further: list[Metric] = field(default_factory=list)

    @property
    def all(self) -> list[Metric]:
        pairs = zip(self.forget, self.override, strict=True) if self.override else ((each,) for each in self.forget)
        return [*(metric for pair in pairs for metric in pair), self.remain, self.distance, *self.further]


@dataclass
class Gate:
    """What must hold before a model that was made to forget is given away. Each limit meets the worse end of a 95 % interval."""

    forget: Fraction = option(0.02, "greatest upper end of the interval of the forget accuracy")
    override: Fraction | None = option(None, "least lower end of the interval of the override rate; null = whatever it is")
    remain_loss: Fraction = option(0.0, "by how much the remain accuracy may lie below the lower end of the interval of `before`")
    distance_factor: PositiveFloat = option(1.0, "how many times the upper end of the distance of `before` that of `after` may be")
    distance_floor: NonNegativeFloat = option(0.0, "a Frechet distance that is always good enough, where that of `before` is near 0")
    relearning: PositiveInt | None = option(None, "fewest steps of the quickest relearning attack; null = however few", unit="steps")
    inversion: Fraction | None = option(None, "greatest upper end of the success of an inversion; null = whatever it is")


@register("unlearning")
@dataclass
class Unlearning(Stage):
    """Compares a model that was made to forget with the model before: metrics.json, release.json and, of images, grid.png.

    All samples are drawn with the same seed and labels, the forgotten classes among them; fewer of some will do. Classes may be prompts,
    where the judge has learnt to tell these apart (the data set `drawn`). The grid has a row for each class and, from left to right, the
    first images of `others`, `before` and `after`, each column of the same noise.
    """

    forget: int | str | list[int | str] = option(
        help="the forgotten class, by number or name, or several; the gate meets the worst of them"
    )
    judge: str = option(help="run of the method `classifier`, trained on all classes")
    before: str = option(help="directory of a generate stage: the model that still knows the class")
    after: str = option(help="directory of a generate stage: the model that has forgotten")
    others: dict[str, str] = option(dict, "name -> directory of further generate stages, measured alike (the teacher, baselines)")
    override: int | str | list[int | str] | None = option(
        None, "the class drawn in its place, or one for each of several; null = none in particular"
    )
    attacks: list[str] = option(list, "directories of stages `relearning` and `inversion` on the run of `after`")
    gate: Gate = option(Gate, "what a release needs; `export` refuses what does not meet it")
    oracle: str | None = option(None, "run of a model that never knew the class, from which divergences are bounded; null = none")
    oracle_count: PositiveInt = option(200, "samples of the oracle on which that is done", unit="samples")
    oracle_draws: PositiveInt = option(8, "noise levels for each of them")
    reference: PositiveInt = option(10_000, "held-out items to compare with, at most", unit="samples")

    def __post_init__(self) -> None:
        forgotten, overrides = (_several(each) for each in (self.forget, self.override))
        if not forgotten:
            raise ConfigError("name at least one class", key="forget")
        if overrides and len(overrides) != len(forgotten):
            raise ConfigError(f"expected one class for each of the {len(forgotten)} forgotten ones, got {len(overrides)}", key="override")
        _refuse_forgotten(forgotten, overrides)
        if taken := {"before", "after"} & set(self.others):
            raise ConfigError("`before` and `after` are taken; use other names", key=f"others.{min(taken)}")
        if self.oracle is not None and len(forgotten) > 1:
            raise ConfigError("an oracle is compared for one forgotten class; leave it out", key="oracle")

    def check(self, places: Mapping[Path, Stage]) -> None:
        refuse_runs(places, {f"others.{name}": place for name, place in self.others.items()} | {"before": self.before, "after": self.after})
        names = judged_classes(places, self.judge)
        if names is not None:
            self._classes(names)

    def execute(self, directory: Path) -> None:
        judge, data = load_judge(self.judge, None)
        names = list(data.class_names)
        forgotten, overrides = self._classes(names)
        held_out = read_held_out(data, self.reference)
        places = {**self.others, "before": self.before, "after": self.after}
        sets = dict(read_samples(self.others, held_out["x"].shape[1:], "others.{}"))
        sets |= read_samples({"before": self.before, "after": self.after}, held_out["x"].shape[1:], "{}")
        self._refuse_other_noise(places, sets)
        self._refuse_other_prompts(places, names)
        real = cached_features(self.judge, judge, held_out["x"])
        measured: dict[str, Measured] = {}
        for name, samples in reversed(sets.items()):  # what was asked for comes first
            read, features = apply_network(judge, samples["x"]).argmax(1), apply_network(judge.features, samples["x"])
            try:
                measured[name] = Measured(
                    [
                        forget_accuracy(read, samples["label"], each, _titled("forget accuracy", each, forgotten, names, name), forgotten)
                        for each in forgotten
                    ],
                    [
                        override_rate(read, samples["label"], each, other, _titled("override rate", each, forgotten, names, name))
                        for each, other in zip(forgotten, overrides)
                    ],
                    remain_accuracy(read, samples["label"], forgotten, f"remain accuracy, {name}"),
                    remain_distance(
                        features, samples["label"], real, held_out["label"], forgotten, f"Frechet distance of the others, {name}"
                    ),
                )
            except ValueError as error:
                raise ConfigError(str(error), key=f"others.{name}" if name in self.others else name) from error
        release = self._release(", ".join(names[each] for each in forgotten), measured)
        if self.oracle is not None:
            runs = {name: str(read_info(place).get("run")) for name, place in places.items()}
            for name, metric in oracle_distances(self.oracle, runs, forgotten[0], self.oracle_count, self.oracle_draws).items():
                measured[name].further.append(metric)
        found = [_as_metric(attack) for attack in release["attacks"]]
        settings = to_dict(self) | {"release": "met" if not unmet(release) else f"not met: {'; '.join(unmet(release))}"}
        settings["grid"] = f"A row for each class, {_SHOWN} samples of each model, from left to right: {', '.join(sets)}; the same noise."
        write_metrics(directory, [*(metric for each in measured.values() for metric in each.all), *found], settings)
        (directory / RELEASE).write_text(json.dumps(release, indent=1))
        if held_out["x"].ndim == 4 and held_out["x"].shape[1] in (1, 3):
            _save_side_by_side(list(sets.values()), len(names), directory / GRID)

    def _classes(self, names: list[str]) -> tuple[list[int], list[int]]:
        """The forgotten classes, and what is drawn in the place of each, if anything in particular."""
        places: list[list[int]] = []
        for key, given in (("forget", self.forget), ("override", self.override)):
            try:
                places.append([class_number(each, names) for each in _several(given)])
            except ValueError as error:
                raise ConfigError(str(error), key=key) from error
        forgotten, overrides = places
        _refuse_forgotten([names[each] for each in forgotten], [names[each] for each in overrides])
        return forgotten, overrides

    def _refuse_other_prompts(self, places: dict[str, str], names: list[str]) -> None:
        """Else a label would stand for another thing than the judge takes it for."""
        for name, place in places.items():
            drawn = read_info(place).get("names")
            if drawn is not None and drawn != names:
                key = f"others.{name}" if name in self.others else name
                raise ConfigError(f"these are samples of {', '.join(drawn)}; the judge reads {', '.join(names)}, in this order", key=key)

    def _refuse_other_noise(self, places: dict[str, str], sets: dict[str, dict[str, Tensor]]) -> None:
        """Else a difference of the models could be one of the noise."""
        seeds = {name: read_info(place).get("seed") for name, place in places.items()}
        for name, samples in sets.items():
            common = min(len(samples["label"]), len(sets["before"]["label"]))
            if not torch.equal(samples["label"][:common], sets["before"]["label"][:common]) or seeds[name] != seeds["before"]:
                key = f"others.{name}" if name in self.others else name
                raise ConfigError(
                    "these samples and those of `before` have other labels or seeds; draw both with the same labels and seed", key=key
                )

    def _release(self, forgotten: str, measured: dict[str, Measured]) -> Release:
        (before, after), gate = (measured[name] for name in ("before", "after")), self.gate
        checks = [_check("forget accuracy, upper end", max(each.high for each in after.forget), gate.forget, True)]
        if after.override and gate.override is not None:
            checks.append(_check("override rate, lower end", min(each.low for each in after.override), gate.override, False))
        checks.append(_check("remain accuracy", after.remain.value, before.remain.low - gate.remain_loss, False))
        farthest = max(gate.distance_factor * before.distance.high, gate.distance_floor)
        checks.append(_check("Frechet distance of the others", after.distance.value, farthest, True))
        weights = str(read_info(self.after).get("weights", ""))
        attacks = self._attacks(weights)
        limits: tuple[tuple[str, float | None, Literal["low", "high"]], ...] = (
            ("steps until relearnt", gate.relearning, "low"),
            ("success of inversion", gate.inversion, "high"),
        )
        for what, limit, end in limits:
            if limit is None:
                continue
            found = [each[end] for each in attacks if each["what"] == what]
            if not found:
                raise ConfigError(f"the gate asks for {what}; name the directory of that attack", key="attacks")
            worst, side = (max(found), "upper") if end == "high" else (min(found), "lower")
            checks.append(_check(f"{what}, {side} end", worst, limit, end == "high"))
        return {"forget": forgotten, "weights": weights, "checks": checks, "attacks": attacks}

    def _attacks(self, weights: str) -> list[Attacked]:
        """Raises ConfigError about attacks on other weights than those that drew `after`."""
        attacks: list[Attacked] = []
        for place in self.attacks:
            finding = read_finding(place)
            if finding.weights != weights:
                raise ConfigError(f"{place} attacked other weights than those that drew {self.after}; attack that run", key="attacks")
            metric = finding.metric
            told: Attacked = {
                "what": metric.name, "measured": metric.value, "low": metric.low, "high": metric.high, "definition": metric.definition
            }  # fmt: skip
            attacks.append(told)
        return attacks


def _several(given: int | str | list[int | str] | None) -> list[int | str]:
    return [] if given is None else given if isinstance(given, list) else [given]


def _refuse_forgotten(forgotten: Sequence[int | str], overrides: Sequence[int | str]) -> None:
    for each in overrides:
        if each in forgotten:
            raise ConfigError(f"{each!r} is to be forgotten; name another one, or null", key="override")


def _as_metric(attack: Attacked) -> Metric:
    what = attack["what"]
    return Metric(f"{what}, after", attack["measured"], attack["low"], attack["high"], _BETTER[what], attack["definition"])


def _titled(kind: str, each: int, forgotten: list[int], names: list[str], name: str) -> str:
    return f"{kind}, {name}" if len(forgotten) == 1 else f"{kind} of {names[each]}, {name}"


def _check(what: str, measured: float, limit: float, below: bool) -> Check:
    return {"what": what, "measured": measured, "limit": limit, "met": measured <= limit if below else measured >= limit}


def read_info(place: str) -> dict[str, Any]:
    """How a stage `generate` drew its samples. Raises ConfigError when that is not recorded."""
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
    """The model card's section: the class, the conditions with their numbers, the attacks, and that all this is no guarantee."""
    lines = [f"## Unlearning\nMade to forget {forgotten}.\n"]
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
    if release["attacks"]:
        lines += ["", "| attack | measured | 95 % interval | how |", "|---|---|---|---|"]
        for attack in release["attacks"]:
            interval = f"{attack['low']:.4g} to {attack['high']:.4g}"
            lines.append(f"| {attack['what']} | {attack['measured']:.4g} | {interval} | {attack['definition']} |")
    else:
        lines += ["", "No attack was tried."]
    return "\n".join([*lines, "", NO_GUARANTEE, "", ""])
