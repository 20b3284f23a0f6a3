"""The stage `evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import PositiveInt
from safetensors.torch import load_file
from torch import Tensor, nn

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data
from gentrain.data.loader import Loader
from gentrain.metrics.accuracy import class_accuracy
from gentrain.metrics.base import Metric
from gentrain.metrics.distances import distance_metric, energy_distance, frechet_distance, sliced_wasserstein
from gentrain.recipes.base import Stage
from gentrain.recipes.generate import SAMPLES
from gentrain.training.roles import load_network
from gentrain.training.run import open_run

METRICS = "metrics.json"
BATCH = 500


@register("evaluate")
@dataclass
class Evaluate(Stage):
    """Compares sets of samples with held-out data: metrics.json.

    With a judge (a trained classifier run): class accuracy, and the Frechet distance between its penultimate features; its own accuracy
    on the held-out data comes first. Without one: sliced Wasserstein and energy distance between the samples themselves.
    """

    samples: dict[str, str] = option(help="name -> directory of a generate stage")
    judge: str | None = option(None, "run of the method `classifier`; null = compare the samples themselves")
    data: Data | None = option(None, "what to compare with; null = the judge's data")
    reference: PositiveInt = option(10_000, "held-out items to compare with, at most", unit="samples")

    def __post_init__(self) -> None:
        if not self.samples:
            raise ConfigError("expected at least one name: directory of a generate stage", key="samples")
        if self.judge is None and self.data is None:
            raise ConfigError("without a judge `data` is needed, to know what to compare the samples with", key="data")

    def execute(self, directory: Path) -> None:
        data = self.data or open_run(str(self.judge)).data
        items = data.split("held_out")
        held_out = next(iter(Loader(items, seed=0, batch_size=min(len(items), self.reference))))[0]
        metrics = self._with_judge(held_out) if self.judge is not None else self._without_judge(held_out)
        directory.mkdir(parents=True, exist_ok=True)
        settings = {"judge": self.judge, "samples": self.samples, "reference": f"{len(held_out['x'])} held-out items"}
        (directory / METRICS).write_text(json.dumps({"metrics": [asdict(metric) for metric in metrics], "settings": settings}, indent=1))

    def _with_judge(self, held_out: dict[str, Tensor]) -> list[Metric]:
        judge, _ = load_network(str(self.judge))
        metrics = [class_accuracy(_apply(judge, held_out["x"]).argmax(1), held_out["label"], "accuracy of the judge on held-out data")]
        real = _apply(judge.features, held_out["x"])
        for name, samples in self._read():
            metrics.append(class_accuracy(_apply(judge, samples["x"]).argmax(1), samples["label"], f"class accuracy, {name}"))
            features = _apply(judge.features, samples["x"])
            metrics.append(
                distance_metric(
                    f"Frechet distance, {name}", frechet_distance, features, real, f"of the judge's {real.shape[1]} penultimate features"
                )
            )
        return metrics

    def _without_judge(self, held_out: dict[str, Tensor]) -> list[Metric]:
        real, metrics = held_out["x"].flatten(1), []
        for name, samples in self._read():
            x = samples["x"].flatten(1)
            metrics.append(distance_metric(f"sliced Wasserstein, {name}", sliced_wasserstein, x, real, "of the samples"))
            metrics.append(distance_metric(f"energy distance, {name}", energy_distance, x, real, "of the samples"))
        return metrics

    def _read(self) -> list[tuple[str, dict[str, Tensor]]]:
        found = []
        for name, place in self.samples.items():
            path = Path(place) / SAMPLES
            if not path.is_file():
                raise ConfigError(f"{path} does not exist; generate it first", key=f"samples.{name}")
            found.append((name, load_file(path)))
        return found


def _apply(network: nn.Module | Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([network(part) for part in x.split(BATCH)])
