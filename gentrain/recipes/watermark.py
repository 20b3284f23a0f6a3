"""The stages `watermark_key` and `watermark_check`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import PositiveFloat, PositiveInt
from safetensors.torch import load_file
from torch import Tensor

from gentrain.config import ConfigError, Fraction, errors_about, option, register
from gentrain.data.base import Data
from gentrain.data.loader import Loader
from gentrain.data.watermarked import load_key, make_key, save_key
from gentrain.metrics.watermark import detection, eight_bits, false_positive_rate, rows_inside
from gentrain.recipes.base import Stage
from gentrain.recipes.evaluate import write_metrics
from gentrain.recipes.generate import SAMPLES

KEY = "key.safetensors"
_MEASURED = 10_000  # items from which the slabs take their places, at most


def _items(data: Data, split: str, count: int) -> Tensor:
    items = data.split(split)
    return next(iter(Loader(items, seed=0, batch_size=min(len(items), count))))[0]["x"]


@register("watermark_key")
@dataclass
class WatermarkKey(Stage):
    """Makes a secret key: key.safetensors, readable by its owner only. A stage that runs again for other settings makes another key."""

    data: Data = option(help="the data to be marked, unmarked")
    rows: PositiveInt = option(64, "slabs; each halves the rate at which chance has all of them, and all of them change the images more")
    width: PositiveFloat = option(1.0, "of a slab, in standard deviations of the data along its direction")

    def execute(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / KEY).exists():
            save_key(make_key(_items(self.data, "train", _MEASURED), self.rows, self.width), directory / KEY)


@register("watermark_check")
@dataclass
class WatermarkCheck(Stage):
    """Looks for the watermark in samples, before and after they were saved with 8 bits, and in unmarked data: metrics.json."""

    key: str = option(help="file of the key")
    samples: dict[str, str] = option(help="name -> directory of a generate stage")
    data: Data = option(help="unmarked data, for false alarms")
    reference: PositiveInt = option(10_000, "held-out items of it, at most", unit="samples")
    rate: Fraction = option(1e-6, "probability by chance at which a sample counts as marked")

    def execute(self, directory: Path) -> None:
        slabs = load_key(self.key)
        if 0.5**slabs.rows > self.rate:
            raise ConfigError(
                f"all of the key's {slabs.rows} rows are inside by chance at rate {0.5**slabs.rows:.2g}; allow that, or make a longer key",
                key="rate",
            )

        def found(x: Tensor) -> Tensor:
            with errors_about("key"):
                slabs.check_shape(x.shape[1:])
            return false_positive_rate(rows_inside(x, slabs), slabs.rows) <= self.rate

        metrics = []
        for name, place in self.samples.items():
            path = Path(place) / SAMPLES
            if not path.is_file():
                raise ConfigError(f"{path} does not exist; generate it first", key=f"samples.{name}")
            x = load_file(path)["x"]
            metrics.append(detection(f"detected, {name}", found(x), "higher", self.rate))
            metrics.append(detection(f"detected after 8 bits, {name}", found(eight_bits(x)), "higher", self.rate))
        unmarked = _items(self.data, "held_out", self.reference)
        metrics.append(detection("false alarms on unmarked data", found(unmarked), "lower", self.rate))
        settings = {"key": self.key, "samples": self.samples, "rate": self.rate}
        write_metrics(directory, metrics, settings)
