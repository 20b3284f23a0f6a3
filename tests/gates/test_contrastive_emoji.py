"""Image towers trained against MiniLM's locked embeddings of emoji names: names never seen, two losses, batches, spoilt pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from gentrain.config import Document, option, register
from gentrain.data.base import CaptionedItems
from gentrain.data.emoji import Emoji
from gentrain.metrics.base import Interval, bootstrap_interval
from gentrain.noise import Noise, derive
from gentrain.recipes.retrieval import embed_held_out
from gentrain.training.loop import Outcome, train
from gentrain.training.run import parse_run, save_config
from gentrain.training.world import World

pytestmark = [pytest.mark.gate, pytest.mark.timeout(3600)]

SEEDS = (0, 1, 2)
LOSSES = ("sigmoid", "softmax")
SPOILT = 0.5  # of the pairs
ROWS = 256  # whose activations are held: more make cached gradients
CHANCE = 5 / 379  # of being among the first five
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
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensor]:
    """(loss, batch, corruption) -> [seeds, 2, N]: the place of the right one among all held-out pairs, from 1, image to text and back."""
    known: dict[Any, Tensor] = {}

    def of(loss: str, batch: int, corruption: str = "none") -> Tensor:
        for seed in SEEDS:
            key = (loss, batch, corruption, seed)
            if key not in known:
                known[key] = _trained(tmp_path_factory.mktemp("run"), *key)
        return torch.stack([known[loss, batch, corruption, seed] for seed in SEEDS])

    return of


def _trained(directory: Path, loss: str, batch: int, corruption: str, seed: int) -> Tensor:
    settings = {
        "data": {"name": "spoilt_emoji", "size": 24, "held_out": 0.2, "corruption": corruption},
        "method": {"name": "contrastive", "loss": loss},
        "model": {"name": "towers", "text": "minilm", "lock": "text", "initial_bias": -math.log(batch - 1), "rows_at_once": ROWS},
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
    image, text, caption = embed_held_out(str(run.directory))
    similarity = image @ text[caption].T
    own = similarity.diagonal()
    return torch.stack([(similarity >= own[:, None]).sum(1), (similarity >= own).sum(0)])


def recall(places: Tensor, k: int) -> Tensor:
    """[..., N] -> [...]: the share within the first k places."""
    return (places <= k).float().mean(-1)


def difference(near: dict[str, Tensor], less: dict[str, Tensor] | None = None) -> Interval:
    """Hits of the sigmoid loss less those of the softmax loss [seeds, 2, N], less the same of others: mean, interval over the N pairs."""
    each = near["sigmoid"].float() - near["softmax"].float()
    if less is not None:
        each = each - (less["sigmoid"].float() - less["softmax"].float())
    return bootstrap_interval(lambda rows: float(rows.mean()), each.mean((0, 1)), resamples=1_000)


def told(values: Iterable[float] | Tensor) -> list[float]:
    return [round(float(value), 4) for value in values]


def test_names_never_seen_are_found(places: Callable[..., Tensor], record_property: Callable[[str, object], None]) -> None:
    """379 held-out pairs, chance 0.26 % @1 and 1.32 % @5."""
    found = places("sigmoid", 64)
    for k, least in ((1, 0.04), (5, 0.15)):
        for way, name in enumerate(("image to text", "text to image")):
            values = recall(found[:, way], k)
            record_property(f"{name} @{k}", told(values))
            assert values.min() > least


@pytest.mark.parametrize("batch", [64, 256, 1024])
def test_both_losses_at(batch: int, places: Callable[..., Tensor], record_property: Callable[[str, object], None]) -> None:
    near = {loss: places(loss, batch) <= 5 for loss in LOSSES}
    for loss in LOSSES:
        record_property(f"{loss} @5", told(near[loss].float().mean((1, 2))))
    record_property("sigmoid less softmax @5", told(difference(near)))
    assert min(float(hits.float().mean()) for hits in near.values()) > 2 * CHANCE


@pytest.mark.parametrize("corruption", ["image", "text", "pairing"])
def test_spoilt_pairs(corruption: str, places: Callable[..., Tensor], record_property: Callable[[str, object], None]) -> None:
    """In arXiv:2303.15343, section 4.9, the sigmoid loss suffers less, at batches of 16k: that must not be refuted here, at 256."""
    clean, near = ({loss: places(loss, 256, what) <= 5 for loss in LOSSES} for what in ("none", corruption))
    for loss in LOSSES:
        left = near[loss].float().mean() / clean[loss].float().mean()
        record_property(f"{loss} @5", told(near[loss].float().mean((1, 2))))
        record_property(f"{loss}, part that is left", round(left.item(), 3))
        assert left < 1
    ahead, further = difference(near), difference(near, clean)
    record_property("sigmoid less softmax @5", told(ahead))
    record_property("the same, less that without corruption", told(further))
    assert further.high > 0
