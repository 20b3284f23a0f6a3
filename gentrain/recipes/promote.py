"""The stage `promote`."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt
from safetensors.torch import load_file
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data
from gentrain.data.pool import SAMPLES
from gentrain.metrics.chamfer import chamfer_distance
from gentrain.metrics.distances import distance_metric, energy_distance, frechet_distance
from gentrain.recipes.base import Stage
from gentrain.recipes.evaluate import load_judge, read_held_out, write_metrics
from gentrain.recipes.features import apply_network
from gentrain.recipes.generate import Generate
from gentrain.samplers.base import Sampler
from gentrain.training.checkpoint import manifest
from gentrain.training.run import CHECKPOINTS, open_run, save_config
from gentrain.training.storage import LocalStorage

log = logging.getLogger(__name__)

PROMOTION = "promotion.json"
_DISTANCES = {"frechet": frechet_distance, "energy": energy_distance, "chamfer": chamfer_distance}


@register("promote")
@dataclass
class Promote(Stage):
    """Draws from each checkpoint that runs have kept and makes the best of them a run of its own, which later stages take as any other.

    The best is the nearest to held-out data. All are drawn with the same noise and labels, so that their distances, which depend on the
    number of samples, can be compared: promotion.json. metrics.json has the promoted one's and `before`'s, corrected and with intervals.
    """

    runs: list[str] = option(help="all their checkpoints compete (training.keep_last, keep_every)")
    before: str | None = option(None, "run whose newest checkpoint competes too: what the runs started from, kept when none is better")
    judge: str | None = option(None, "run of the method `classifier`; null = compare the samples themselves")
    by: Literal["frechet", "energy", "chamfer"] | None = option(
        None, "distance, of the judge's penultimate features where there is one; null = frechet with a judge, energy without"
    )
    data: Data | None = option(None, "what to compare with; null = the first run's")
    count: PositiveInt = option(2_000, "samples of each checkpoint, and held-out items at most", unit="samples")
    sampler: Sampler | None = option(None, "null = the run's")
    seed: NonNegativeInt = option(0, "of the noise, the same for all: another one than that of the final samples")
    actors: NonNegativeInt = option(0, "size of the Ray fleet; 0 = in this process, without Ray")

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("expected at least one run", key="runs")

    def settings(self) -> dict[str, Any]:
        values = super().settings()
        del values["actors"]
        return values

    def execute(self, directory: Path) -> None:
        work, places = directory / "candidates", {}
        for source, newest_only in [*((run, False) for run in self.runs), *([(self.before, True)] if self.before else [])]:
            storage = open_run(source, "runs").storage
            newest = storage.latest()
            if newest is None:
                raise ConfigError(f"{source} has no checkpoint yet; train it first", key="runs")
            for name in [newest] if newest_only else storage.names():
                label = f"{Path(source).name} at {int(name)}"
                places[label] = work / f"{Path(source).name}-{name}"
                self._draw(source, name, places[label])
        data = self.data or open_run(self.runs[0]).data
        judge = load_judge(self.judge, data)[0] if self.judge is not None else None

        def read(x: Tensor) -> Tensor:
            return x if judge is None else apply_network(judge.features, x)

        reference = read(read_held_out(data, self.count)["x"]).flatten(1)
        by = self.by or ("energy" if self.judge is None else "frechet")
        features = {label: read(load_file(place / "drawn" / SAMPLES)["x"]).flatten(1) for label, place in places.items()}
        distances = {label: _DISTANCES[by](x, reference) for label, x in features.items()}
        best = min(distances, key=lambda label: distances[label])
        log.info("%s is promoted: %s distance %.4g", best, by, distances[best])
        told = [*places][-1:] if self.before else []
        smooth = "energy" if by == "chamfer" else by  # of nearest neighbours there is no bootstrap
        metrics = [
            distance_metric(f"{smooth} distance, {label}", _DISTANCES[smooth], features[label], reference, what)
            for label, what in {**dict.fromkeys(told, "what the runs started from"), best: "promoted"}.items()
        ]
        copy_run(places[best], open_run(places[best]).storage.names()[-1], directory)
        write_metrics(directory, metrics, {"runs": self.runs, "before": self.before, "reference": f"{len(reference)} held-out items"})
        (directory / PROMOTION).write_text(json.dumps({"by": by, "promoted": best, "distances": distances}, indent=1))
        shutil.rmtree(work)

    def _draw(self, source: str, checkpoint: str, place: Path) -> None:
        """Makes the checkpoint a run in `place` and draws from it, unless an attempt before has."""
        if (place / "drawn" / SAMPLES).is_file():
            return
        shutil.rmtree(place, ignore_errors=True)
        copy_run(source, checkpoint, place)
        Generate(str(place), self.count, sampler=self.sampler, seed=self.seed, actors=self.actors).execute(place / "drawn")


def copy_run(source: str | Path, checkpoint: str, target: Path) -> None:
    """Makes `target` a run of the configuration of `source` with that checkpoint alone."""
    run = open_run(source)
    storage, copies = run.storage, LocalStorage(target / CHECKPOINTS)
    copies.prepare(checkpoint)
    with storage.open(checkpoint) as opened:
        for name in opened.hashes:
            copies.put(checkpoint, name, lambda path, name=name: shutil.copyfile(opened.file(name), path))  # type: ignore[misc]
        copies.publish(checkpoint, manifest(opened.hashes))
    run.output, run.training.checkpoints = str(target), None
    save_config(run)
