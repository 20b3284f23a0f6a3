"""Image towers trained against MiniLM's locked embeddings of emoji names: names never seen, two losses, batches, spoilt pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import pytest
import torch

from gentrain.config import Document, option, register
from gentrain.data.base import CaptionedItems
from gentrain.data.emoji import Emoji
from gentrain.noise import Noise, derive
from gentrain.recipes.retrieval import embed_held_out, retrieval
from gentrain.training.loop import Outcome, train
from gentrain.training.run import parse_run, save_config
from gentrain.training.world import World

pytestmark = [pytest.mark.gate, pytest.mark.timeout(3600)]

SEEDS = (0, 1, 2)
SPOILT = 0.5  # of the pairs
Corruption = Literal["none", "image", "text", "pairing"]


@register("spoilt_emoji")
@dataclass
class SpoiltEmoji(Emoji):
    """Emoji whose training pairs are spoilt with probability 1/2, after arXiv:2303.15343, section 4.9.

    image: noise in its place. text: letters at random. pairing: the spoilt pairs exchange their names.
    """

    corruption: Corruption = option("none", "what of the spoilt pairs")

    @cached_property
    def _spoilt(self) -> torch.Tensor:
        noise = self._noise(2)
        return noise.uniform((len(noise),)) < SPOILT

    def _noise(self, stream: int) -> Noise:
        return Noise(derive(stream, "spoilt"), torch.arange(len(self.names("train"))))

    @property
    def captions(self) -> list[str]:
        names = list(super().captions)
        if self.corruption != "text":
            return names
        noise = self._noise(3)
        return [*names, *("".join(map(chr, row)) for row in noise.randint(97, 123, (len(noise), 12)).tolist())]

    def split(self, name: str) -> CaptionedItems:
        items = super().split(name)
        if name != "train":
            return items
        x, caption, spoilt = items.x.clone(), items.caption.clone(), self._spoilt
        if self.corruption == "image":
            x[spoilt] = self._noise(4).uniform(tuple(x.shape))[spoilt] * 2 - 1
        elif self.corruption == "text":
            caption[spoilt] = len(super().captions) + torch.arange(len(caption))[spoilt]
        elif self.corruption == "pairing":
            caption[spoilt] = caption[spoilt].roll(1)
        return CaptionedItems(x, items.label, caption)


@pytest.fixture(scope="module")
def recalls(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, float]]:
    """(loss, batch, corruption, seed) -> recall of held-out pairs; each trained once."""
    known: dict[Any, dict[str, float]] = {}

    def of(loss: str, batch: int, corruption: str, seed: int) -> dict[str, float]:
        key = (loss, batch, corruption, seed)
        if key not in known:
            known[key] = _trained(tmp_path_factory.mktemp("run"), *key)
        return known[key]

    return of


def _trained(directory: Path, loss: str, batch: int, corruption: str, seed: int) -> dict[str, float]:
    settings = {
        "data": {"name": "spoilt_emoji", "size": 24, "held_out": 0.2, "corruption": corruption},
        "method": {"name": "contrastive", "loss": loss},
        "model": {"name": "towers", "text": "minilm", "lock": "text", "initial_bias": -math.log(batch - 1), "rows_at_once": 128},
        "optimizer": {"name": "adamw", "lr": 2.0e-3, "beta2": 0.95, "weight_decay": 0.1},
        "schedule": {"name": "cosine", "warmup": 1_280},
        "engine": "torch",
        "training": {"samples": 25_600, "batch_size": batch, "log_every": 25_600},
        "seed": seed,
        "output": str(directory / "run"),
    }
    run = parse_run(Document(settings, "gate"))
    save_config(run)
    assert train(run, World(0, 1, torch.device("cpu")), lambda: False) is Outcome.FINISHED
    found = {metric.name: metric.value for metric in retrieval(*embed_held_out(str(run.directory)))[:4]}
    print(loss, batch, corruption, seed, found, flush=True)
    return found


def test_names_never_seen_are_found(recalls: Callable[..., dict[str, float]], record_property: Callable[[str, object], None]) -> None:
    """379 held-out pairs, chance 0.26 % @1 and 1.32 % @5."""
    for name in ("image to text @1", "text to image @1", "image to text @5", "text to image @5"):
        values = [recalls("sigmoid", 128, "none", seed)[name] for seed in SEEDS]
        record_property(name, [round(value, 4) for value in values])
        assert min(values) > (0.04 if name.endswith("@1") else 0.15)


@pytest.mark.parametrize("batch", [64, 256, 1024])
def test_both_losses_at(batch: int, recalls: Callable[..., dict[str, float]], record_property: Callable[[str, object], None]) -> None:
    for loss in ("sigmoid", "softmax"):
        values = [recalls(loss, batch, "none", seed)["text to image @5"] for seed in SEEDS]
        record_property(f"{loss}, text to image @5", [round(value, 4) for value in values])
        assert mean(values) > 0.1


@pytest.mark.parametrize("corruption", ["image", "text", "pairing"])
def test_spoilt_pairs(corruption: str, recalls: Callable[..., dict[str, float]], record_property: Callable[[str, object], None]) -> None:
    for loss in ("sigmoid", "softmax"):
        values = [recalls(loss, 256, corruption, seed)["text to image @5"] for seed in SEEDS]
        record_property(f"{loss}, text to image @5", [round(value, 4) for value in values])
