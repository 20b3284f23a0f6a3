"""A place to stop short of a run's end, where a trial of a sweep is compared with the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gentrain.config import ConfigError
from gentrain.training.callbacks import Callback
from gentrain.training.loop import Trainer
from gentrain.training.run import METRICS


class Milestone(Callback):
    """Asks for a stop once so many samples are seen: never, unless told. Raises ConfigError when the lines of metrics lack a key that is
    needed there."""

    def __init__(self, at: float = math.inf, metric: str = "samples"):
        self.samples, self._at, self._metric = 0, at, metric

    @property
    def reached(self) -> bool:
        return self.samples >= self._at

    def watch(self, trainer: Trainer) -> Milestone:
        self.samples = trainer.clock.samples
        return self

    def on_log(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        skipped = not any(key.startswith("loss/") for key in record)  # every step since the last line: nothing was measured
        if self._metric not in record and not skipped:
            raise ConfigError(f"{METRICS} has no {self._metric!r}; name what it has: {', '.join(record)}", key="sweep.metric")

    def after_step(self, trainer: Trainer) -> None:
        self.samples = trainer.clock.samples
