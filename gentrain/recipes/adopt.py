"""The stage `adopt`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gentrain.config import Document, build, option, register, to_dict
from gentrain.data.base import Data
from gentrain.models.base import Model
from gentrain.recipes.base import Stage
from gentrain.samplers.base import Sampler
from gentrain.training.run import RunConfig, save_config


@register("adopt")
@dataclass
class Adopt(Stage):
    """Makes a pipeline a run, without training or copying it: what draws from runs, compares or attacks them can do so with it."""

    model: Model = option(help="the pipeline: a pretrained network")
    data: Data = option(help="of the shape that it draws, with the classes or captions that it is asked for")
    sampler: Sampler | None = option(None, "how it is drawn from; null = 10 steps of Euler's method, without guidance")

    def execute(self, directory: Path) -> None:
        values = {"method": "as_is", "training": {"samples": 1}, "engine": "torch", "output": str(directory)}
        values |= {key: value for key, value in to_dict(self).items() if key in ("model", "data", "sampler") and value is not None}
        run = build(RunConfig, Document(values, f"{directory} as the recipe has it"))
        run.fit_space()
        save_config(run)
