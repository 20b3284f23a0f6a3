"""The stage `retrieval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gentrain.config import ConfigError, option, register, to_dict
from gentrain.data.loader import Loader
from gentrain.metrics.retrieval import retrieval
from gentrain.models.towers import embedded
from gentrain.noise import Noise
from gentrain.recipes.base import Stage
from gentrain.recipes.evaluate import write_metrics
from gentrain.training.roles import load_network
from gentrain.training.run import RunConfig, open_run


def embed_held_out(directory: str) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised embeddings of a run's held-out images [N, D], of all captions of the data [M, D], and each image's caption [N] int64."""
    towers, run = load_network(directory)
    batch = _held_out(run)
    tokens: Tensor = run.codec().encode({"caption": torch.arange(len(run.data.captions))}, Noise(0, torch.arange(1)))["tokens"]
    return *embedded(towers, batch["x"], tokens), batch["caption"]


def _held_out(run: RunConfig) -> dict[str, Tensor]:
    items = run.data.split("held_out")
    return next(iter(Loader(items, seed=0, batch_size=len(items))))[0]


@register("retrieval")
@dataclass
class Retrieval(Stage):
    """Looks for the captions of held-out images and for the images of captions, with a run of `contrastive`: metrics.json.

    Candidates are what was held out; in the zero-shot classification the captions of the whole data set, those of training included.
    """

    run: str = option(help="the run")

    def execute(self, directory: Path) -> None:
        if open_run(self.run).method.registered_name != "contrastive":
            raise ConfigError(f"{self.run} is not a run of contrastive, whose towers this asks", key="run")
        write_metrics(directory, retrieval(*embed_held_out(self.run)), to_dict(self))
