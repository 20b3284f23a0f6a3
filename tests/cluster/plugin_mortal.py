"""A user's plugin: a method whose worker kills itself once, as a machine that goes down would, and samplers, one of which does so, too."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gentrain.config import option, register
from gentrain.methods.base import Batch, Clock, Loss, Nets, Update
from gentrain.methods.flow_matching import FlowMatching
from gentrain.noise import Noise
from gentrain.samplers.euler import Euler


@register("mortal_flow")
@dataclass
class MortalFlow(FlowMatching):
    """Flow matching; the process that reads sample `at` is killed unless the file `marker` is there, which it writes first."""

    marker: str = option("", "file")
    at: int = option(0, "position of the sample", unit="samples")

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("model", self._loss)

    def _loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        if bool((batch["index"] == self.at).any()) and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.loss(nets, batch, noise)


@register("plugin_euler")
@dataclass(kw_only=True)
class PluginEuler(Euler):
    """Euler, of a class that only this file knows."""


@register("mortal_euler")
@dataclass(kw_only=True)
class MortalEuler(Euler):
    """Euler; the process that draws sample `at` is killed unless the file `marker` is there, which it writes first. `log`: what was drawn.

    With `raises` it is asked to stop there instead.
    """

    marker: str = option("", "file")
    log: str = option("", "file: a line for each batch that was drawn, the number of its first sample")
    at: int = option(0, "number of the sample")
    raises: bool = option(False, "an error in place of SIGKILL")

    def sample(self, denoiser: Any, shape: tuple[int, ...], noise: Noise, condition: Any = None) -> Tensor:
        found = super().sample(denoiser, shape, noise, condition)
        if bool((noise.rows == self.at).any()) and not Path(self.marker).exists():
            Path(self.marker).touch()
            if self.raises:
                raise RuntimeError("asked to stop")
            os.kill(os.getpid(), signal.SIGKILL)
        with Path(self.log).open("a") as file:
            file.write(f"{int(noise.rows[0])}\n")
        return found
