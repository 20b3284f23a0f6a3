"""The stage `train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gentrain.cluster.launch import launch
from gentrain.config import Document, build, option, register, to_dict
from gentrain.recipes.base import Stage, Stopped
from gentrain.training.loop import Outcome
from gentrain.training.run import RunConfig
from gentrain.training.settings import weight_settings


@register("train")
@dataclass
class Train(Stage):
    """Trains a run. Its output is the run's directory."""

    run: RunConfig = option(help="the run; `base:` names its file")

    @property
    def trained(self) -> RunConfig:
        return self.run

    def place(self, directory: Path) -> None:
        self.run.output = str(directory)

    def settings(self) -> dict[str, Any]:
        values = super().settings()
        values["run"] = plain(self.run, weight_settings(self.run))
        return values

    def execute(self, directory: Path) -> None:
        run = build(RunConfig, Document(plain(self.run, to_dict(self.run)), f"{directory} as the recipe has it"))
        if launch(run) is Outcome.STOPPED:
            raise Stopped


def plain(run: RunConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The run's `values` without path and prediction of a pipeline that an earlier stage writes: until it is there nobody knows them."""
    awaited = any(run.model_of(role).awaited for role in run.method.roles)
    return {key: value for key, value in values.items() if not (awaited and key in run.left_out)}
