"""The stages `draw_captions` and `likeness`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from safetensors.torch import save_file
from torch import Tensor

from gentrain.cluster.generation import generate
from gentrain.config import ConfigError, option, register, to_dict
from gentrain.data.base import Data
from gentrain.data.loader import Loader
from gentrain.images import save_grid
from gentrain.metrics.likeness import efficientnet_features, median_rank, rank_among
from gentrain.recipes.base import Stage
from gentrain.recipes.evaluate import read_samples, write_metrics
from gentrain.recipes.generate import GRID, INFO, SAMPLES
from gentrain.samplers.base import Sampler
from gentrain.training.run import open_run

_GRID_ROWS = 6  # of drawn pictures


@register("draw_captions")
@dataclass
class DrawCaptions(Stage):
    """Draws one picture for each of some captions of a split: samples.safetensors (x, label = the caption's place), info.json, grid.png.

    The grid has the real picture below each drawn one.
    """

    run: str = option(help="the run to draw from")
    data: Data = option(help="the pictures with captions that it learnt from, not their latents")
    split: Literal["train", "held_out"] = option("held_out", "whose captions")
    count: PositiveInt = option(200, "captions, at most: a random part of the split", unit="samples")
    sampler: Sampler | None = option(None, "null = the run's")
    seed: NonNegativeInt = option(0, "of the noise")
    columns: PositiveInt = option(16, "pictures in a row of the grid")

    def execute(self, directory: Path) -> None:
        real = _part(self.data, self.split, self.count)
        run = open_run(self.run)
        names = [self.data.captions[place] for place in real["caption"].tolist()]
        sampler = run.drawn_with(self.sampler)
        x = generate(self.run, sampler, torch.arange(len(names)), self.seed, prompts=names)
        directory.mkdir(parents=True, exist_ok=True)
        save_file({"x": x, "label": real["caption"]}, directory / SAMPLES)
        pairs = [torch.cat([x[row], real["x"][row]]) for row in torch.arange(len(x)).split(self.columns)][:_GRID_ROWS]
        save_grid(torch.cat(pairs), directory / GRID, min(len(x), self.columns))
        info = {"run": self.run, "seed": self.seed, "sampler": to_dict(sampler), "drawn": sampler.told, "names": names}
        (directory / INFO).write_text(json.dumps(info, indent=1))


@register("likeness")
@dataclass
class Likeness(Stage):
    """Where each drawn picture's own real one stands among all real ones of the data, by features of EfficientNet-Lite0: metrics.json."""

    samples: dict[str, str] = option(help="name -> directory of a stage `draw_captions`")
    data: Data = option(help="the pictures with captions")

    def execute(self, directory: Path) -> None:
        parts = [_part(self.data, split, 2**31) for split in ("train", "held_out")]
        x, caption = (torch.cat([part[key] for part in parts]) for key in ("x", "caption"))
        try:
            real = efficientnet_features(x)
        except ValueError as error:
            raise ConfigError(str(error), key="name") from error
        places = torch.full((len(self.data.captions),), -1)
        places[caption] = torch.arange(len(caption))
        metrics = []
        for name, samples in read_samples(self.samples, x.shape[1:]):
            own = places[samples["label"]]
            features = efficientnet_features(samples["x"])
            told = f"of the own real picture among all {len(real)}, in %, by EfficientNet-Lite0 features (centred cosine)"
            metrics.append(median_rank(rank_among(features, real, own), f"median rank, {name}", told))
            # what is there without looking at the words: each picture against the real one of the next name
            shuffled = rank_among(features, real, own.roll(1))
            metrics.append(median_rank(shuffled, f"median rank, {name}, another's picture", f"{told}, of the picture of another name"))
        write_metrics(directory, metrics, to_dict(self))


def _part(data: Data, split: str, count: int) -> dict[str, Tensor]:
    items = data.split(split)
    batch: dict[str, Tensor] = next(iter(Loader(items, seed=0, batch_size=min(len(items), count))))[0]
    if "caption" not in batch:
        raise ConfigError(f"{data.registered_name} has no captions; name data that has, such as emoji", key="data")
    return batch
