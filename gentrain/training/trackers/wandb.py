"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gentrain.config import option, register
from gentrain.training.trackers.base import Tracked, Tracker, Tracking

_WAIT_S = 60  # for the service, as a run starts


class _Tracking(Tracking):
    def __init__(self, tracker: WandB, run: Tracked):
        import wandb

        self._image: Any = wandb.Image
        self._run = wandb.init(
            project=tracker.project, entity=tracker.entity, mode=tracker.mode, name=run.directory.name, id=run.identity, resume="allow",
            dir=str(run.directory), config=run.config, settings=wandb.Settings(silent=True, init_timeout=_WAIT_S),
        )  # fmt: skip
        # its own step must never fall, and an attempt that goes on from a checkpoint begins before the last record
        self._run.define_metric("*", step_metric="samples")

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        self._run.log({**values, "samples": samples})

    def image(self, file: Path, samples: int) -> None:
        self._run.log({"generated": self._image(str(file)), "samples": samples})

    def close(self) -> None:
        self._run.finish()


@register("wandb")
@dataclass
class WandB(Tracker):
    """Weights & Biases (`pip install 'gentrain[wandb]'`). Offline it writes to `wandb/` in the run's directory, for `wandb sync`."""

    package = ("wandb", "wandb")

    project: str = option("gentrain", "the project")
    entity: str | None = option(None, "user or team; null = that of the key")
    mode: Literal["offline", "online"] = option("offline", "online needs a key (WANDB_API_KEY, or `wandb login`)")

    def start(self, run: Tracked) -> Tracking:
        return _Tracking(self, run)
