"""A user's plugin that has its own process signalled, or ends it, at the moment that the environment names in MOMENT."""

import atexit
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gentrain.config import register
from gentrain.methods.base import Batch, Clock, Loss, Nets, Update
from gentrain.methods.flow_matching import FlowMatching
from gentrain.noise import Noise
from gentrain.recipes.base import Stage


def reached(moment: str) -> None:
    wanted, _, act = os.environ.get("MOMENT", "").partition(" ")
    if wanted != moment:
        return
    if act == "exit":
        sys.exit(0)
    if act == "wait":
        Path(os.environ["MARKER"]).touch()
        time.sleep(0.01)
    else:
        os.kill(os.getpid(), signal.Signals[act])


@register("flow_of_moments")
@dataclass
class FlowOfMoments(FlowMatching):
    """Flow matching with moments."""

    def fit(self) -> None:
        reached("fit")
        super().fit()

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("model", self._loss)

    def _loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        reached("step")
        return self.loss(nets, batch, noise)


@register("moment")
@dataclass
class Moment(Stage):
    """Writes a file after its moment."""

    def execute(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        reached("stage")
        (directory / "done").touch()


atexit.register(reached, "end")
