"""The stage `export`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from gentrain.config import ConfigError, option, register, to_dict
from gentrain.export import export
from gentrain.recipes.base import Stage
from gentrain.recipes.evaluate import read_metrics
from gentrain.samplers.base import Sampler
from gentrain.training.roles import load_network


@register("export")
@dataclass
class Export(Stage):
    """Writes a run's generator as a diffusers pipeline with a model card."""

    run: str = option(help="the run to export")
    sampler: Sampler | None = option(None, "whose steps the pipeline takes; null = the run's")
    scores: str | None = option(None, "directory of an evaluate stage, for the card")

    def execute(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)  # of an interrupted attempt at this very stage
        self.write(directory)

    def write(self, out: Path) -> Path:
        """Exports to `out`, which must not exist or be empty (FileExistsError)."""
        denoiser, run = load_network(self.run)
        if run.method.generator is None:
            raise ConfigError(f"{self.run} holds a {run.method.registered_name}, which generates nothing", key="run")
        metrics = read_metrics(self.scores) if self.scores else []
        return export(
            out,
            denoiser,
            self.sampler or run.sampler,
            class_names=run.data.class_names,
            licence=run.data.licence,
            config=to_dict(run),
            metrics=metrics,
        )
