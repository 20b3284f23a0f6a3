"""The stage `prefer`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from pydantic import NonNegativeFloat, PositiveInt
from safetensors.torch import save_file
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data
from gentrain.recipes.base import Stage
from gentrain.recipes.evaluate import read_held_out, read_samples
from gentrain.recipes.generate import SAMPLES
from gentrain.recipes.score import judged, read_weights, require_weights
from gentrain.rewards.base import Reward

PAIRS, PROMPTS = "pairs.safetensors", "prompts.txt"


@register("prefer")
@dataclass
class Prefer(Stage):
    """Pairs of samples that were drawn for the same texts, of which a reward says which it prefers, for the data set `preferences`.

    Writes pairs.safetensors and prompts.txt, and the pairs of the texts that come last, which are not among them, as two sets of samples:
    held_out/preferred and held_out/rejected, without ties, for the stage `score`.
    """

    samples: dict[str, str] = option(help="name -> directory of a stage that draws; all for the same texts in the same order")
    reward: Reward = option(help="what prefers")
    data: Data = option(help="whose captions, or else classes, the samples' labels are")
    weights: dict[str, str] = option(dict, "role of the reward -> the run whose network it reads")
    tie: NonNegativeFloat = option(0.0, "scores that differ by no more than this count as a tie")
    held_out: PositiveInt = option(100, "texts whose pairs are held out", unit="texts")

    def __post_init__(self) -> None:
        if len(self.samples) < 2:
            raise ConfigError("expected two or more sets of samples, to pair", key="samples")
        require_weights(self.reward, self.weights, self.data)

    def execute(self, directory: Path) -> None:
        networks, shape = read_weights(self.reward, self.weights), read_held_out(self.data, 1)["x"].shape[1:]
        sets = read_samples(self.samples, shape)
        texts, key = self.data.captions or self.data.class_names, "caption" if self.data.captions else "label"
        label = sets[0][1]["label"]
        for name, samples in sets:
            if not torch.equal(samples["label"], label):
                raise ConfigError(f"{name} and {sets[0][0]} were not drawn for the same texts in the same order", key=f"samples.{name}")
        if not self.held_out < len(label) or not 0 <= int(label.min()) <= int(label.max()) < len(texts):
            raise ConfigError(
                f"expected labels of {len(texts)} texts and more than {self.held_out} of them, got {len(label)}", key="samples"
            )
        scores = [judged(self.reward, samples["x"], label, key, networks) for _, samples in sets]
        pairs = [_pair(a[1]["x"], b[1]["x"], u - v, self.tie) for (a, u), (b, v) in combinations(zip(sets, scores, strict=True), 2)]
        kept = {name: torch.cat([pair[name][-self.held_out :] for pair in pairs]) for name in pairs[0]}
        decided = kept["votes"][:, 0] > 0
        if not decided.any():
            raise ConfigError("all pairs that are held out are ties; lower it", key="tie")
        directory.mkdir(parents=True, exist_ok=True)
        learnt = {name: torch.cat([pair[name][: -self.held_out] for pair in pairs]) for name in pairs[0]}
        save_file({**learnt, key: label[: -self.held_out].repeat(len(pairs))}, directory / PAIRS)
        (directory / PROMPTS).write_text("\n".join(texts), encoding="utf-8")
        for name in ("preferred", "rejected"):
            where = directory / "held_out" / name
            where.mkdir(parents=True, exist_ok=True)
            save_file({"x": kept[name][decided], "label": label[-self.held_out :].repeat(len(pairs))[decided]}, where / SAMPLES)


def _pair(first: Tensor, second: Tensor, difference: Tensor, tie: float) -> dict[str, Tensor]:
    """The preferred of each two first; votes [N, 3] for it, the other, and neither."""
    better = (difference >= 0).reshape(-1, *[1] * (first.ndim - 1))
    tied = difference.abs() <= tie
    votes = torch.stack([~tied, torch.zeros_like(tied), tied], 1).long()
    return {"preferred": torch.where(better, first, second), "rejected": torch.where(better, second, first), "votes": votes}
