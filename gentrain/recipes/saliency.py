"""The stage `saliency`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from safetensors.torch import save_file

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data
from gentrain.data.chosen import Chosen
from gentrain.data.loader import Loader
from gentrain.methods.forgetting import class_number
from gentrain.methods.matching import noised, output_error
from gentrain.methods.saliency_unlearn import MASK, salient
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise, derive
from gentrain.paths.times import Uniform
from gentrain.recipes.base import Stage
from gentrain.training.roles import load_network

BATCH = 100


@register("saliency")
@dataclass
class Saliency(Stage):
    """Finds the weights that a class hangs on most, those with the largest gradients of its denoising error: mask.safetensors.

    For the method saliency_unlearn (arXiv:2310.12508, eq. 4). The gradient is that of the mean over images of the class, noises and times.
    """

    run: str = option(help="run of the model that is to forget")
    forget: int | str = option(help="the class, by number or name")
    share: Annotated[float, Field(gt=0, le=1)] = option(0.5, "of all weights that may learn", source="arXiv:2310.12508, section 5")
    data: Data | None = option(None, "holds images of the class; null = the run's")
    count: PositiveInt = option(500, "images of the class, at most", unit="samples")
    seed: NonNegativeInt = option(0, "of noises and times")

    def execute(self, directory: Path) -> None:
        denoiser, run = load_network(self.run)
        if not isinstance(denoiser, Denoiser) or run.codec().shape != run.data.shape:
            raise ConfigError(f"{self.run} is no run of a denoiser of the data themselves", key="run")
        data = self.data or run.data
        try:
            forgotten = class_number(self.forget, data.class_names)
        except ValueError as error:
            raise ConfigError(str(error), key="forget") from error
        items = Chosen(data, classes=[forgotten], count=self.count).split("train")
        batch = next(iter(Loader(items, seed=0, batch_size=len(items))))[0]
        network = denoiser.network.requires_grad_(True)  # type: ignore[attr-defined]
        for rows in torch.arange(len(items)).split(BATCH):
            noise = Noise(derive(self.seed, "saliency"), rows)
            sample = noised({key: value[rows] for key, value in batch.items()}, noise, run.path, Uniform(), 0.0)
            (output_error(denoiser, sample).sum() / len(items)).backward()
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in network.named_parameters()}
        mask = salient(gradients, self.share)
        directory.mkdir(parents=True, exist_ok=True)
        save_file({name: value.to(torch.uint8) for name, value in mask.items()}, directory / MASK)
        learning = sum(int(value.sum()) for value in mask.values())
        info = {"run": self.run, "images": len(items), "weights": sum(value.numel() for value in mask.values()), "learning": learning}
        (directory / "info.json").write_text(json.dumps(info, indent=1))
