"""Direct Discriminative Optimization: a likelihood model fine-tuned past its likelihood, with itself as the discriminator."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn.functional import softplus

from gentrain.config import ConfigError, Fraction, option, register
from gentrain.data.base import Data
from gentrain.data.pool import Pool
from gentrain.methods.base import Batch, Clock, Frozen, Loss, Method, Nets, Role, Trained, Update, condition_of, part_of
from gentrain.methods.diffusion import Weighting, regressed, regression
from gentrain.methods.matching import noised
from gentrain.models.base import Condition
from gentrain.noise import Noise
from gentrain.paths.base import Path, TimeLaw, expand
from gentrain.paths.reflected_heat import ReflectedHeat
from gentrain.paths.times import Uniform
from gentrain.samplers.base import Sampler, samplers_of
from gentrain.samplers.heun import Heun

ON_THE_FLY = "on_the_fly"
_LEAST_PRODUCT = 1.0  # of beta and the number of coordinates: 10 to 300 works (the page of ddo), 0.1 diverges
CALIBRATION = "calibration.json"  # what the stage `calibrate` writes, read where beta names its directory


def log_ratio(prediction: Tensor, reference: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """weight (|reference - target|^2 - |prediction - target|^2), the norms SUMMED over C, H, W: [B, ...] x 3, [B] -> [B], float32 or more.

    The estimate of log p_theta(x) - log p_ref(x) from one time and noise, up to the weight (arXiv:2503.01103, eq. 16). Written as
    -<d, d + 2 (reference - target)> with d = prediction - reference: the two norms are nearly equal, and their difference would lose them.
    """
    work = torch.promote_types(prediction.dtype, torch.float32)
    prediction, reference, target = prediction.to(work), reference.to(work), target.to(work)
    change = prediction - reference
    return -weight * (change * (change + 2 * (reference - target))).flatten(1).sum(1)


def ddo_loss(real_log_ratio: Tensor, fake_log_ratio: Tensor, alpha: float, beta: float, fake_weight: Tensor | None = None) -> Tensor:
    """mean softplus(-beta r) + alpha mean(fake_weight softplus(beta r')), r of data and r' of the reference's samples (arXiv:2503.01103,
    eq. 13): [B], [B'] -> scalar.

    softplus, for log(1 - sigmoid) is -inf in float32 beyond 17. fake_weight [B'] multiplies alpha, the mean is over all rows: 0 takes a row
    out, 1 keeps it. At r = r' = 0 the loss is (1 + alpha) log 2 and its gradient beta / 2 that of the likelihood, whatever alpha.
    """
    fake = softplus(beta * fake_log_ratio)
    if fake_weight is not None:
        fake = fake * fake_weight
    return softplus(-beta * real_log_ratio).mean() + alpha * fake.mean()


@dataclass(frozen=True)
class Ratio:
    """Of each row [B]: the log-ratio (with gradient), what both are trained by, averaged over coordinates, whether its label was kept."""

    log_ratio: Tensor
    loss: Tensor
    reference_loss: Tensor
    kept: Tensor


@dataclass
class RatioMethod(Method):
    """Base of the methods that compare the model with its frozen beginning by the log-ratio of their likelihoods.

    The model and the reference meet the same label (and time and noise), and dropout is off in both, so that the log-ratio is 0 at first.
    """

    roles: ClassVar[dict[str, Role]] = {"reference": Frozen(given=True), "model": Trained(init="reference", ema=True)}
    generator: ClassVar[str | None] = "model"
    dropout: ClassVar[bool] = False

    label_dropout: Fraction = option(0.1, "probability that a label becomes the null class", source="arXiv:2207.12598")

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("model", self.loss)

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        raise NotImplementedError

    def ratio(self, nets: Nets, batch: Batch, noise: Noise) -> Ratio:
        """The log-ratio of the model to the reference on the rows of a batch."""
        raise NotImplementedError


@dataclass
class DiffusionRatio(RatioMethod):
    """Of diffusion and flow models: both networks meet the same time and noise, one of each per row."""

    times: TimeLaw = option(Uniform, "law of the training times: that of the reference's training")
    weighting: Weighting = option("uniform", "uniform (on the network's output), edm or min_snr (on x0): that of the reference's training")
    gamma: PositiveFloat = option(5.0, "greatest weight of min_snr", source="arXiv:2303.09556")

    def check(self, path: Path) -> None:
        if isinstance(path, ReflectedHeat):
            raise ValueError(f"{self.registered_name} needs x_t = alpha x0 + sigma eps; take a path other than {path.registered_name}")

    def ratio(self, nets: Nets, batch: Batch, noise: Noise) -> Ratio:
        sample = noised(batch, noise, nets.model.path, self.times, self.label_dropout)
        target, weight = regression(nets.model, sample, self.weighting, self.gamma)
        with torch.no_grad():
            reference = regressed(nets.reference, sample, self.weighting)
        prediction = regressed(nets.model, sample, self.weighting)
        errors = [(expand(weight, x) * (x.detach() - target).square()).flatten(1).mean(1) for x in (prediction, reference)]
        kept = kept_rows(condition_of(batch), sample.condition, weight)
        return Ratio(log_ratio(prediction, reference, target, weight), errors[0], errors[1], kept)


def kept_rows(before: Condition | None, after: Condition | None, of: Tensor) -> Tensor:
    """Which of the rows `of` [B, ...] kept their label, or prompt: [B] bool. Those without one before, of an unconditional model, count."""
    before, after = before or {}, after or {}
    kept = [before[key] == after[key] for key in ("label", "null") if key in after]
    return torch.stack(kept).all(0) if kept else torch.ones(len(of), dtype=torch.bool, device=of.device)


@dataclass
class SelfPlay(RatioMethod):
    """Base of Direct Discriminative Optimization (arXiv:2503.01103): one round of self-play, whatever the log-ratio is of."""

    pool: str = option(
        ON_THE_FLY, "directory of a stage `generate` that drew from the reference without guidance; on_the_fly: each step draws"
    )
    beta: PositiveFloat | str = option(
        0.05, "scale of the log-ratio, which is a SUM over the sample's coordinates; or the directory of a stage `calibrate`",
        source="arXiv:2503.01103: 0.01 to 0.1 for 3,072 coordinates",
    )  # fmt: skip
    alpha: NonNegativeFloat = option(4.0, "weight of the reference's samples", source="arXiv:2503.01103: 0.5 to 6")
    normalise_alpha: bool = option(False, "divides the loss by max(alpha, 1), so that a sweep of alpha is none of the learning rate")
    sampler: Sampler = option(lambda: Heun(steps=18), "draws from the reference on the fly", source="arXiv:2206.00364: 35 network calls")
    guard: PositiveFloat = option(
        2.0, "the run ends when the model's training loss on data is above this many times the reference's on the same rows"
    )

    unit_scale: ClassVar[bool] = True  # whether each of a sample's coordinates adds about as much to the log-ratio, whatever its size

    def __post_init__(self) -> None:
        if self.sampler.of_tokens != self.of_tokens:
            able = samplers_of(self.of_tokens)
            raise ConfigError(f"{self.sampler.registered_name} does not draw what the reference knows; these do: {able}", key="sampler")
        if self.sampler.other_law is not None:
            key = f"sampler.{self.sampler.other_law.partition(' ')[0]}"
            raise ConfigError(f"samples with {self.sampler.other_law} are no samples of the reference; leave it out", key=key)

    def check_data(self, data: Data) -> None:
        size = math.prod(data.shape)
        if self.unit_scale and not isinstance(self.beta, str) and self.beta * size < _LEAST_PRODUCT:
            raise ConfigError(
                f"with {size} coordinates beta = {self.beta:g} leaves the discriminator at 1/2: the log-ratio is a sum over them; "
                f"take at least {10 * _LEAST_PRODUCT / size:.2g}, or the output of a stage `calibrate`",
                key="beta",
            )

    def fit(self) -> None:
        if isinstance(self.beta, str):
            self.beta = read_calibration(self.beta)

    def pools(self) -> dict[str, Pool]:
        return {} if self.pool == ON_THE_FLY else {"fake": Pool(self.pool, "reference", "method.pool")}

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        assert not isinstance(self.beta, str)
        fakes = self._drawn(nets, batch, noise) if self.pool == ON_THE_FLY else part_of(batch, "fake")
        real, fake = self.ratio(nets, batch, noise), self.ratio(nets, fakes, noise)
        loss = ddo_loss(real.log_ratio, fake.log_ratio, self.alpha, self.beta, fake.kept.to(fake.log_ratio.dtype))
        if self.normalise_alpha:
            loss = loss / max(self.alpha, 1.0)
        r, r_fake = real.log_ratio.detach(), fake.log_ratio.detach()
        logs = {
            "model_loss": real.loss.mean(),
            "reference_loss": real.reference_loss.mean(),
            "log_ratio_data": r.mean(),
            "log_ratio_fake": r_fake.mean(),
            "log_ratio_square": (r.square().mean() + r_fake.square().mean()) / 2,
            "discriminator_accuracy": (2 + r.sign().mean() - r_fake.sign().mean()) / 4,
        }
        return Loss(loss, logs)

    def diverged(self, record: Mapping[str, float]) -> str | None:
        now, start = record.get("model_loss"), record.get("reference_loss")
        if now is None or start is None or now <= self.guard * start:
            return None
        return (
            f"the training loss on data is {now:.4g}, more than {self.guard:g} times the reference's on the same rows ({start:.4g}; "
            "method.guard): the model forgets the data; raise method.beta (the stage `calibrate` finds it), or lower method.alpha or "
            "optimizer.lr"
        )

    def _drawn(self, nets: Nets, batch: Batch, noise: Noise) -> Batch:
        """Samples of the reference with the batch's own conditions."""
        with torch.no_grad():
            x = self.sampler.sample(nets.reference, tuple(batch["x"].shape), noise, condition_of(batch))
        return {**batch, "x": x}


@register("ddo")
@dataclass
class DDO(SelfPlay, DiffusionRatio):
    """Direct Discriminative Optimization (arXiv:2503.01103) of a diffusion or flow model: one round of self-play.

    The model learns to tell data from samples of its frozen beginning, the reference, by the ratio of their likelihoods, and is the
    generator as well. roles.reference.weights names the run that it continues, whose path, prediction, times and weighting are its own.
    """

    @property
    def unit_scale(self) -> bool:  # type: ignore[override]
        return self.weighting == "uniform"


def read_calibration(directory: str) -> float:
    """The beta that a stage `calibrate` chose. Raises ConfigError, about beta, when there is none."""
    path = FilePath(directory) / CALIBRATION
    try:
        beta = float(json.loads(path.read_bytes())["beta"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is no calibration ({type(error).__name__}: {error}); give a number, or the output of a stage `calibrate`",
            key="method.beta",
        ) from error
    if not 0 < beta < float("inf"):
        raise ConfigError(f"{path} says beta = {beta}; calibrate again", key="method.beta")
    return beta
