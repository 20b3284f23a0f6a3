"""The stage `generate`."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from safetensors.torch import save_file

from gentrain.cluster.generation import generate
from gentrain.config import ConfigError, option, register, to_dict
from gentrain.data.pool import INFO as INFO
from gentrain.data.pool import SAMPLES as SAMPLES
from gentrain.images import save_grid
from gentrain.models.adapters import digest_of
from gentrain.models.control import CONTROL
from gentrain.recipes.base import Stage
from gentrain.recipes.controls import paired
from gentrain.samplers.base import Sampler
from gentrain.training.controls import controls_of
from gentrain.training.roles import load_weights
from gentrain.training.run import open_run

GRID = "grid.png"


@register("generate")
@dataclass
class Generate(Stage):
    """Draws samples from a run: samples.safetensors (x [N, ...], label [N]), info.json and, of images, grid.png.

    A generator that is given a control other than the class takes those of the held-out items in turn, with their labels; the file has
    them as "control", and the grid a row of them above each row of samples where they are images of the same size. What an attempt that
    was stopped or killed has drawn is kept, in hundreds, and not drawn again.
    """

    run: str = option(help="the run to draw from")
    count: PositiveInt = option(1_000, "samples", unit="samples")
    labels: list[NonNegativeInt] | None = option(None, "classes to draw in turn; null = all of them")
    prompts: list[str] | None = option(None, "what to draw in turn, for a network that takes prompts; null = the labels")
    negative_prompt: str | None = option(None, "what guidance leads away from; null = the null_prompt of the run's model")
    sampler: Sampler | None = option(None, "null = the run's")
    seed: NonNegativeInt = option(0, "of the noise; sample i is the same whatever the count and the number of actors")
    decoded: bool = option(
        True, "what the network draws is decoded to images, where it draws latents or tokens; false for the pool of a run on tokens"
    )
    actors: NonNegativeInt = option(0, "size of the Ray fleet; 0 = in this process, without Ray")
    columns: PositiveInt = option(10, "images in a row of the grid")
    grid: PositiveInt = option(100, "images in the grid, the first of the samples")

    def __post_init__(self) -> None:
        if self.labels == []:
            raise ConfigError("no class is named; null draws all of them", key="labels")
        if self.prompts == []:
            raise ConfigError("no prompt is given; null draws the labels", key="prompts")
        if self.prompts is not None and self.labels is not None:
            raise ConfigError("prompts stand in place of labels; give one of the two", key="prompts")

    def settings(self) -> dict[str, Any]:
        values = super().settings()
        del values["actors"]
        return values

    def execute(self, directory: Path) -> None:
        run = open_run(self.run)
        codec = run.codec()
        if self.prompts is not None and not codec.takes_prompts:
            raise ConfigError("this run's network takes classes, not prompts; name labels instead", key="prompts")
        if self.negative_prompt is not None and not codec.takes_prompts:
            raise ConfigError("this run's network takes classes, not prompts; leave it out", key="negative_prompt")
        classes = len(self.prompts if self.prompts is not None else codec.names)
        asked = self.labels if self.labels is not None else list(range(classes)) or [-1]
        if classes and max(asked) >= classes:
            raise ConfigError(f"class {max(asked)} does not exist; those of {self.run} are 0 to {classes - 1}", key="labels")
        labels = torch.tensor(asked).repeat(-(-self.count // len(asked)))[: self.count]
        sampler, control = run.drawn_with(self.sampler), run.method.steering
        if self.labels is not None and control is not None and not control.labels:
            raise ConfigError(
                "this run's samples have the classes of the held-out items whose controls they take; leave it out", key="labels"
            )
        if self.negative_prompt is not None and sampler.guidance == 1:
            raise ConfigError("the sampler draws without guidance, which alone reads it; set sampler.guidance", key="negative_prompt")
        found, controls = controls_of(run, labels)
        labels = found if self.prompts is None else labels
        weights = digest_of(load_weights(self.run))  # before: of a run that trains on, they are told to be of former weights at worst
        kept = directory / "chunks"
        x = generate(
            self.run, sampler, labels, self.seed, self.actors, self.prompts, controls, self.decoded, self.negative_prompt, (kept, weights)
        )
        (directory / INFO).unlink(missing_ok=True)  # whatever is killed here, it never tells of other samples
        save_file({"x": x, "label": labels} | ({} if controls is None else {CONTROL: controls}), directory / SAMPLES)
        if self.decoded and x.ndim == 4 and x.shape[1] in (1, 3):
            beside = controls is not None and controls.shape == x.shape
            images = paired(2 * controls - 1, x, self.columns) if beside and controls is not None else x
            save_grid(images[: self.grid], directory / GRID, self.columns)
        info = {"run": to_dict(self)["run"], "count": self.count, "seed": self.seed, "sampler": to_dict(sampler)}
        info["names"] = list(self.prompts if self.prompts is not None else codec.names)  # what the labels stand for
        info["negative_prompt"] = self.negative_prompt
        info["drawn"], info["other_law"] = sampler.told, sampler.other_law
        info["weights"] = weights  # training refuses samples of other weights than its reference has
        (directory / INFO).write_text(json.dumps(info, indent=1))
        shutil.rmtree(kept)
