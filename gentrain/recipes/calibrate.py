"""The stage `calibrate`."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import PositiveFloat, PositiveInt

from gentrain.cluster.launch import launch
from gentrain.config import ConfigError, option, register
from gentrain.methods.ddo import CALIBRATION, SelfPlay
from gentrain.recipes.base import Stage, Stopped
from gentrain.training.loop import Outcome
from gentrain.training.run import METRICS, RunConfig
from gentrain.training.settings import weight_settings

log = logging.getLogger(__name__)

_LEAST, _MOST = 0.02, 20.0  # of beta times the spread: below, sigmoid stays at 1/2 and nothing bounds alpha's term; above, nothing moves


@dataclass(frozen=True)
class Spread:
    """What a probe found: beta, the root mean square of the log-ratio, the share of rows that its sign tells apart."""

    beta: float
    log_ratio: float
    accuracy: float


@register("calibrate")
@dataclass
class Calibrate(Stage):
    """Finds beta for a run of `ddo`: calibration.json, which its `beta: ${output:calibrate}` reads.

    The log-ratio is 0 at first, so a probe trains the model as the run would, without the samples' term (the first step is that of the
    likelihood, whatever alpha), and takes beta = product / the root mean square of the log-ratio. A number given as method.beta is checked.
    """

    run: RunConfig = option(help="the run that beta is for")
    steps: PositiveInt = option(300, "optimiser steps of the probe")
    product: PositiveFloat = option(
        0.3, "of beta and the log-ratio's root mean square after the probe", source="measured, docs/methods/ddo.md"
    )

    def __post_init__(self) -> None:
        if not isinstance(self.run.method, SelfPlay):
            raise ConfigError(
                f"beta is a key of ddo and token_ddo, and this is a run of {self.run.method.registered_name}", key="run.method"
            )

    def place(self, directory: Path) -> None:
        self.run.output = str(directory / "probe")

    def settings(self) -> dict[str, Any]:
        values = super().settings()
        values["run"] = weight_settings(self.run)
        return values

    def execute(self, directory: Path) -> None:
        method = self.run.method
        assert isinstance(method, SelfPlay)
        probe = self._probe(method)
        if launch(probe) is Outcome.STOPPED:
            raise Stopped
        record = json.loads((probe.directory / METRICS).read_text().splitlines()[-1])
        square, accuracy = (math.nan if record[key] is None else record[key] for key in ("log_ratio_square", "discriminator_accuracy"))
        found = spread(square, accuracy, self.product)
        log.info("beta = %.3g: the log-ratio's root mean square is %.3g after %d steps", found.beta, found.log_ratio, self.steps)
        if not isinstance(method.beta, str):
            refuse_meaningless(method.beta, found)
        (directory / CALIBRATION).write_text(json.dumps(vars(found), indent=1))

    def _probe(self, method: SelfPlay) -> RunConfig:
        training = self.run.training
        samples = self.steps * training.batch_size
        beta = 2 / math.prod(self.run.codec().shape)  # so small that the loss is nearly straight in the log-ratio
        training = replace(training, samples=samples, log_every=max(1, samples // 4), keep_best=None, preview_every=0, spike_guard=None)
        return replace(self.run, method=replace(method, alpha=0.0, beta=beta), training=training)


def spread(square: float, accuracy: float, product: float) -> Spread:
    """From the mean square of the log-ratio and what beta times its root shall be. Raises ConfigError when it is 0 or not finite."""
    if not 0 < square < float("inf"):
        raise ConfigError(
            f"the mean square of the log-ratio is {square} after the probe; raise optimizer.lr or steps", key="run.optimizer.lr"
        )
    root = math.sqrt(square)
    return Spread(float(f"{product / root:.3g}"), root, accuracy)


def refuse_meaningless(beta: float, found: Spread) -> None:
    """Raises ConfigError for a beta with which the discriminator would say 1/2, or be certain, of every sample."""
    product = beta * found.log_ratio
    if not _LEAST <= product <= _MOST:
        what = "says 1/2 of every sample, and nothing bounds what alpha pushes away" if product < _LEAST else "is certain of every sample"
        raise ConfigError(
            f"beta = {beta:g} times the spread of the log-ratio, {found.log_ratio:.3g}, is {product:.2g}: the discriminator {what}. "
            f"The log-ratio is a sum over the coordinates; take beta = {found.beta:g}, or the output of this stage",
            key="run.method.beta",
        )
