"""TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gentrain.config import register, to_yaml
from gentrain.training.trackers.base import Tracked, Tracker, Tracking

TENSORBOARD = "tensorboard"


class _Tracking(Tracking):
    def __init__(self, run: Tracked):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.directory / TENSORBOARD), purge_step=run.samples + 1)
        self._writer.add_text("config", "".join(f"    {line}\n" for line in to_yaml(run.config).splitlines()), run.samples)

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, samples)

    def image(self, file: Path, samples: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(file) as image:
            self._writer.add_image("samples", np.asarray(image.convert("RGB")), samples, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


@register("tensorboard")
@dataclass
class TensorBoard(Tracker):
    """Files for TensorBoard in the run's directory, `tensorboard/`: scalars, sample grids, the configuration as a text."""

    def start(self, run: Tracked) -> Tracking:
        return _Tracking(run)
