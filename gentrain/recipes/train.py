"""The stage `train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gentrain.cluster.launch import launch
from gentrain.config import option, register
from gentrain.recipes.base import Stage, Stopped
from gentrain.training.loop import Outcome
from gentrain.training.run import RunConfig


@register("train")
@dataclass
class Train(Stage):
    """Trains a run. Its output is the run's directory."""

    run: RunConfig = option(help="the run; `base:` names its file")

    def place(self, directory: Path) -> None:
        self.run.output = str(directory)

    def settings(self) -> dict[str, Any]:
        values = super().settings()
        # Where it runs, what is logged and where it lies change nothing in the weights.
        for key in ("cluster", "output", "plugins"):
            del values["run"][key]
        for key in ("log_every", "checkpoint_every", "keep_last", "preview_every", "preview_count", "data_workers"):
            del values["run"]["training"][key]
        return values

    def execute(self, directory: Path) -> None:
        if launch(self.run) is Outcome.STOPPED:
            raise Stopped
