"""The stage `likelihood`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.data.loader import Loader
from gentrain.methods.base import condition_of
from gentrain.metrics.base import Metric, bootstrap_interval
from gentrain.metrics.likelihood import bits_per_dim, dequantised, flow_log_density, variational_bound
from gentrain.models.tokens import TokenModel
from gentrain.noise import Noise, derive
from gentrain.paths.inside import StickBreaking
from gentrain.recipes.base import Stage
from gentrain.recipes.evaluate import write_metrics
from gentrain.training.roles import load_network
from gentrain.training.run import open_run

BATCH = 100


@register("likelihood")
@dataclass
class Likelihood(Stage):
    """How likely held-out data are: bits per coordinate under a run of `reflected_diffusion`, nats per sample under a token model.

    The latter are exact, the sum over tokens, and read none of the keys below `count`. The result is metrics.json.
    """

    run: str = option(help="the run whose model is asked")
    count: PositiveInt = option(1_000, "held-out items, at most", unit="samples")
    levels: Annotated[int, Field(ge=2)] | None = option(
        None, "of the data, equally spaced from wall to wall, such as 256: bits of probabilities; null = continuous data, of densities"
    )
    draws: PositiveInt = option(16, "random times per item of the variational bound")
    steps: NonNegativeInt = option(0, "Heun steps of the probability flow's likelihood; 0 = the bound only")
    probes: NonNegativeInt = option(1, "random vectors for each divergence; 0 = exact, at the cost of a backward pass per coordinate")
    seed: NonNegativeInt = option(0, "of the noise")

    def execute(self, directory: Path) -> None:
        asked = open_run(self.run)
        if asked.method.registered_name != "reflected_diffusion" and not asked.method.of_tokens:
            raise ConfigError(f"{self.run} is neither a run of reflected_diffusion nor one on tokens, whose likelihood this is", key="run")
        if self.levels is not None and (asked.method.of_tokens or isinstance(asked.path.space, StickBreaking)):
            raise ConfigError("neither tokens nor the cube of stick_breaking have levels; leave it out", key="levels")
        denoiser, run = load_network(self.run)
        items = run.data.split("held_out")
        batch = next(iter(Loader(items, seed=0, batch_size=min(len(items), self.count))))[0]
        if isinstance(denoiser, TokenModel):
            metric = self._of_tokens(denoiser, batch)
            return write_metrics(directory, [metric], {"run": self.run, "items": len(batch["x"])})
        bounds, densities = [], []
        for first in range(0, len(batch["x"]), BATCH):
            part = {key: value[first : first + BATCH] for key, value in batch.items()}
            noise = Noise(derive(self.seed, "likelihood"), torch.arange(first, first + len(part["x"])))
            x, condition = run.path.space.encode(part["x"]), condition_of(part)
            with torch.no_grad():
                bounds.append(variational_bound(denoiser, x, noise, condition, self.draws, self.levels))
            if self.steps:
                x, more = (x, 0.0) if self.levels is None else dequantised(denoiser.path.box, x, self.levels, noise)
                densities.append(-flow_log_density(denoiser, x, noise, condition, self.steps, self.probes) - more * x[0].numel())
        dim = batch["x"][0].numel()
        metrics = [self._metric("variational bound", torch.cat(bounds), dim)]
        if densities:
            metrics.append(self._metric("probability flow", torch.cat(densities), dim))
        settings = {"run": self.run, "items": len(batch["x"]), "levels": self.levels, "draws": self.draws, "steps": self.steps}
        write_metrics(directory, metrics, settings)

    def _of_tokens(self, model: TokenModel, batch: dict[str, Tensor]) -> Metric:
        parts = [{key: value[first : first + BATCH] for key, value in batch.items()} for first in range(0, len(batch["x"]), BATCH)]
        with torch.no_grad():
            nats = -torch.cat([model.log_prob(part["x"], condition_of(part)) for part in parts])
        interval = bootstrap_interval(lambda sample: float(sample.mean()), nats)
        what = f"-log p of {len(nats)} held-out items, the sum over {batch['x'].shape[1]} tokens"
        return Metric("nats per sample", *interval, "lower", what)

    def _metric(self, name: str, nats: Tensor, dim: int) -> Metric:
        bits = bits_per_dim(nats, dim)
        interval = bootstrap_interval(lambda sample: float(sample.mean()), bits)
        return Metric(f"bits per dim, {name}", *interval, "lower", f"of {len(bits)} held-out items, in the path's coordinates")
