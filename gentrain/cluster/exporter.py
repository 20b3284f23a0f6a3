"""The numbers of a run for Prometheus. Ray's exporter on each node serves them; without Ray nothing is measured, and nothing listens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gentrain.training.callbacks import Callback
from gentrain.training.loop import Trainer

_SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]  # upper ends of the histograms' bins


class Exporter(Callback):
    """What a rank of a run measures of itself."""

    def __init__(self, trainer: Trainer):
        tags = {"run": trainer.run.directory.name, "attempt": trainer.attempt, "rank": str(trainer.world.rank)}
        self._step = histogram("gentrain_step_seconds", "from the wait for its data to the end of a step", tags)
        self._wait = histogram("gentrain_loader_wait_seconds", "that a step waited for its data", tags)
        self._gauges = {}
        if trainer.world.is_main:
            names = {"samples": "samples seen, over all attempts", "samples_per_second": "since the record before, over all ranks"}
            for name, what in names.items():
                self._gauges[name] = gauge(f"gentrain_{name}", what, tags)
        self._last = (trainer.clock.samples, trainer.seconds)

    def after_step(self, trainer: Trainer) -> None:
        self._step.observe(trainer.step_s)
        self._wait.observe(trainer.waited_s)

    def on_log(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        samples, seconds = self._last
        self._last = (record["samples"], record["seconds"])
        if self._gauges:
            self._gauges["samples"].set(record["samples"])
            self._gauges["samples_per_second"].set((record["samples"] - samples) / max(record["seconds"] - seconds, 1e-9))


def histogram(name: str, what: str, tags: Mapping[str, str]) -> Any:
    """A histogram of seconds whose observations all have these tags."""
    from ray.util.metrics import Histogram

    made = Histogram(name, what, boundaries=_SECONDS, tag_keys=tuple(tags))
    made.set_default_tags(dict(tags))
    return made


def gauge(name: str, what: str, tags: Mapping[str, str]) -> Any:
    """A number that is set anew."""
    from ray.util.metrics import Gauge

    made = Gauge(name, what, tag_keys=tuple(tags))
    made.set_default_tags(dict(tags))
    return made


def failures(directory: Path) -> Any:
    """The counter of attempts of a run that failed."""
    from ray.util.metrics import Counter

    counter = Counter("gentrain_failures", "attempts that ended by the death of a worker or node", tag_keys=("run",))
    counter.set_default_tags({"run": directory.name})
    return counter
