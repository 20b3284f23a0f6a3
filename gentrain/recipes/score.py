"""The stage `score`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gentrain.config import ConfigError, option, register, to_dict
from gentrain.data.base import Data
from gentrain.metrics.base import Metric, bootstrap_interval, proportion
from gentrain.recipes.base import Stage
from gentrain.recipes.evaluate import read_held_out, read_samples, write_metrics
from gentrain.rewards.base import Reward
from gentrain.training.given import refuse_other_reading, source_of
from gentrain.training.roles import load_network

_BATCH = 64  # images at once
_HELD_OUT = 10_000


@register("score")
@dataclass
class Score(Stage):
    """What a reward says of sets of samples and, beside them, of held-out data: the mean of each, metrics.json.

    With `text_image` or `towers` this is a CLIP-style score (arXiv:2104.08718, without its factor 2.5). Of a reward that reads texts each
    set is also scored with the text of another sample: what is there without the words. Sets drawn for the same texts may be compared
    sample by sample: what the texts differ in is not in that interval, which is narrower than those of the means.
    """

    samples: dict[str, str] = option(help="name -> directory of a stage `generate` or `draw_captions`")
    reward: Reward = option(help="what scores; take one that the samples' model was not trained on")
    data: Data = option(help="whose captions, or else classes, the samples' labels are")
    weights: dict[str, str] = option(dict, "role of the reward -> the run whose network it reads")
    against: dict[str, str] = option(dict, "set -> the set, of the same labels in the same order, that it is compared with by sample")

    def __post_init__(self) -> None:
        if not self.samples:
            raise ConfigError("expected at least one name: directory of a stage that draws", key="samples")
        for name, other in self.against.items():
            if unknown := [each for each in (name, other) if each not in self.samples]:
                raise ConfigError(f"{unknown[0]!r} is none of the samples: {', '.join(self.samples)}", key=f"against.{name}")
        require_weights(self.reward, self.weights, self.data)

    def execute(self, directory: Path) -> None:
        networks = read_weights(self.reward, self.weights)
        held_out = read_held_out(self.data, _HELD_OUT)
        key = "caption" if self.data.captions else "label"
        sets = [*read_samples(self.samples, held_out["x"].shape[1:]), ("held-out data", {"x": held_out["x"], "label": held_out[key]})]
        metrics, known = [], len(self.data.captions or self.data.class_names)
        scores: dict[str, Tensor] = {}
        for name, samples in sets:
            label = samples["label"]
            if len(label) and int(label.max()) >= known > 0:
                raise ConfigError(f"label {int(label.max())} is none of the {known} of the data; name those it was drawn for", key="data")
            scores[name] = judged(self.reward, samples["x"], label, key, networks)
            metrics.append(self._mean(name, scores[name], ""))
            if hasattr(self.reward, "texts") and label.unique().numel() > 1:
                others = judged(self.reward, samples["x"], _moved(label), key, networks)
                metrics.append(self._mean(f"{name}, another's text", others, ", of another's text"))
        labels = {name: samples["label"] for name, samples in sets}
        for name, other in self.against.items():
            if not torch.equal(labels[name], labels[other]):
                raise ConfigError(f"{name} and {other} were not drawn for the same texts in the same order", key=f"against.{name}")
            of = ", the difference of samples with the same text,"
            difference = scores[name] - scores[other]
            metrics.append(self._mean(f"{name} less {other}", difference, of))
            definition = f"share of {len(difference)} texts whose sample scores higher, Wilson interval"
            metrics.append(proportion(f"{self.reward.registered_name}, {name} above {other}", difference > 0, "higher", definition))
        write_metrics(directory, metrics, to_dict(self))

    def _mean(self, name: str, scores: Tensor, of: str) -> Metric:
        value, low, high = bootstrap_interval(lambda rows: float(rows.mean()), scores)
        which = self.reward.registered_name
        definition = f"mean reward {which}{of} over {len(scores)} images, bootstrap interval; range {_range(self.reward)}"
        return Metric(f"{which}, {name}", value, low, high, "higher", definition)


def require_weights(reward: Reward, weights: dict[str, str], data: Data) -> None:
    """Raises ConfigError unless runs are named for just the networks that the reward reads, and it can judge images of the data."""
    roles = reward.networks()
    if missing := [role for role in roles if role not in weights]:
        raise ConfigError(f"the reward reads the network {missing[0]}; name its run", key=f"weights.{missing[0]}")
    if unknown := [role for role in weights if role not in roles]:
        raise ConfigError(f"the reward reads no network of this name; it reads: {', '.join(roles) or 'none'}", key=f"weights.{unknown[0]}")
    try:
        reward.check_data(data)
    except ValueError as error:
        raise ConfigError(str(error), key="reward") from error


def read_weights(reward: Reward, weights: dict[str, str]) -> dict[str, Any]:
    """The networks that the reward reads. Raises ConfigError when a run's is read otherwise than it was trained."""
    networks = {}
    for role, judge in reward.networks().items():
        networks[role], run = load_network(weights[role])
        if judge.model is not None:
            refuse_other_reading(run, source_of(run, role), judge.model, f"weights.{role}")
    return networks


@torch.no_grad()
def judged(reward: Reward, x: Tensor, label: Tensor, key: str, networks: dict[str, Any]) -> Tensor:
    """The reward of each sample, [N] float64. key: what the labels are, "caption" or "label"."""
    parts = zip(x.split(_BATCH), label.split(_BATCH), strict=True)
    return torch.cat([reward(images, {key: places}, networks) for images, places in parts]).double()


def _moved(label: Tensor) -> Tensor:
    """Each row's label becomes that of the next row that has another one."""
    order = label.argsort(stable=True)
    most = int(label.unique(return_counts=True)[1].max())
    moved = torch.empty_like(label)
    moved[order] = label[order].roll(most)
    return moved


def _range(reward: Reward) -> str:
    return f"{reward.range[0]:g} to {reward.range[1]:g}"
