"""The stage `likelihood`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.methods.base import condition_of
from gentrain.metrics import free_likelihood, likelihood
from gentrain.metrics.base import Metric, bootstrap_interval
from gentrain.metrics.likelihood import bits_per_dim, dequantised, level_points
from gentrain.models.denoiser import Denoiser
from gentrain.models.tokens import TokenModel
from gentrain.noise import Noise, derive
from gentrain.paths.inside import StickBreaking
from gentrain.paths.reflected_heat import ReflectedHeat
from gentrain.paths.space import Free
from gentrain.recipes.base import Stage
from gentrain.recipes.evaluate import read_held_out, write_metrics
from gentrain.samplers.euler import Euler
from gentrain.training.roles import load_network
from gentrain.training.run import RunConfig, open_run

BATCH = 100


@register("likelihood")
@dataclass
class Likelihood(Stage):
    """How likely held-out data are: bits per coordinate under a diffusion or flow model, nats per sample under a token model.

    The latter are exact, the sum over tokens, and read none of the keys below `count`. The result is metrics.json.
    """

    run: str = option(help="the run whose generator is asked, as it is: without guidance")
    count: PositiveInt = option(1_000, "held-out items, at most", unit="samples")
    levels: Annotated[int, Field(ge=2)] | None = option(
        None, "of the data, equally spaced from wall to wall (images: from -1 to 1), such as 256: bits of probabilities; null = densities"
    )
    draws: PositiveInt = option(16, "random times per item of the variational bound")
    steps: NonNegativeInt = option(0, "Heun steps of the probability flow's likelihood; 0 = the bound only")
    probes: NonNegativeInt = option(1, "random vectors for each divergence; 0 = exact, at the cost of a backward pass per coordinate")
    seed: NonNegativeInt = option(0, "of the noise")

    def execute(self, directory: Path) -> None:
        metrics, settings = self.measure()
        write_metrics(directory, metrics, settings)

    def measure(self) -> tuple[list[Metric], dict[str, Any]]:
        """The rows, and what they were measured with. Raises ConfigError."""
        asked = open_run(self.run)
        refuse_unknown_likelihood(asked, self.run)
        if self.levels is not None and (asked.method.of_tokens or isinstance(asked.path.space, StickBreaking)):
            raise ConfigError("neither tokens nor the cube of stick_breaking have levels; leave it out", key="levels")
        model, run = load_network(self.run)
        batch = read_held_out(run.data, self.count)
        settings = {"run": self.run, "items": len(batch["x"])}
        parts = [{key: value[first : first + BATCH] for key, value in batch.items()} for first in range(0, len(batch["x"]), BATCH)]
        if isinstance(model, TokenModel):
            return [_of_tokens(model, parts)], settings
        found = [self._nats(model, run, part, BATCH * number) for number, part in enumerate(parts)]
        names = ("variational bound", "probability flow")
        metrics = [_of_coordinates(name, torch.cat(nats), batch["x"][0].numel()) for name, nats in zip(names, zip(*found))]
        return metrics, settings | {"levels": self.levels, "draws": self.draws, "steps": self.steps, "probes": self.probes}

    def _nats(self, denoiser: Denoiser, run: RunConfig, part: dict[str, Tensor], first: int) -> tuple[Tensor, ...]:
        """The bound, and where it is asked for the flow's, of each item: [B] each."""
        noise = Noise(derive(self.seed, "likelihood"), torch.arange(first, first + len(part["x"])))
        x, condition = run.path.space.encode(part["x"]), condition_of(part)
        walls = isinstance(denoiser.path, ReflectedHeat)
        kind, box = (likelihood, denoiser.path.box) if walls else (free_likelihood, free_likelihood.IMAGES)  # type: ignore[attr-defined]
        if self.levels is not None:
            points = level_points(box, self.levels, x)
            place = (x.double() - points[0]) / (points[1] - points[0])
            if float((place - place.round()).abs().max()) > 0.01:
                raise ConfigError(f"the data do not lie on {self.levels} levels; name as many as they have, or leave it out", key="levels")
        with torch.no_grad():
            bound = kind.variational_bound(denoiser, x, noise, condition, self.draws, self.levels)
        if not self.steps:
            return (bound,)
        x, more = (x, 0.0) if self.levels is None else dequantised(box, x, self.levels, noise)
        return bound, -kind.flow_log_density(denoiser, x, noise, condition, self.steps, self.probes) - more * x[0].numel()


def refuse_unknown_likelihood(run: RunConfig, directory: str) -> None:
    """Raises ConfigError for a run whose generator says nothing of how likely data are."""
    if run.method.of_tokens and run.method.generator is not None:
        return
    if run.method.generator is None:
        raise ConfigError(f"{directory} holds a {run.method.registered_name}, which generates nothing; name a generator's run", key="run")
    try:
        run.method.check_sampler(Euler())
    except ValueError as error:
        raise ConfigError(f"{directory} holds a student that follows no flow; name its teacher's run", key="run") from error
    if tuple(run.codec().shape) != tuple(run.data.shape) or run.codec().takes_prompts:
        raise ConfigError(f"{directory} is of a pipeline: the likelihood would be that of its latents; name a run on the data", key="run")
    if not isinstance(run.path, ReflectedHeat) and not isinstance(run.path.space, Free):
        raise ConfigError(
            f"no likelihood is known on path {run.path.registered_name} in the space {run.path.space.registered_name}", key="run"
        )


def _of_tokens(model: TokenModel, parts: list[dict[str, Tensor]]) -> Metric:
    with torch.no_grad():
        nats = -torch.cat([model.log_prob(part["x"], condition_of(part)) for part in parts])
    interval = bootstrap_interval(lambda sample: float(sample.mean()), nats)
    what = f"-log p of {len(nats)} held-out items, the sum over {parts[0]['x'].shape[1]} tokens"
    return Metric("nats per sample", *interval, "lower", what)


def _of_coordinates(name: str, nats: Tensor, dim: int) -> Metric:
    bits = bits_per_dim(nats, dim)
    interval = bootstrap_interval(lambda sample: float(sample.mean()), bits)
    return Metric(f"bits per dim, {name}", *interval, "lower", f"of {len(bits)} held-out items, in the path's coordinates")
