"""Diffusion: denoising score matching."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from gentrain.config import Fraction, option, register
from gentrain.methods.base import Batch, Clock, Loss, Method, Nets, Role, Trained, Update, weighed
from gentrain.methods.matching import Noised, loss_by_noise_level, noised
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import TimeLaw
from gentrain.paths.times import Uniform

_GREATEST_SNR = 1e8  # float32 resolves little noise below sigma = 1e-4; without a limit the weighted error is inf * 0 at sigma = 0


def edm_weight(log_snr: Tensor, sigma_data: float) -> Tensor:
    """EDM's weight of the squared error of x0 (arXiv:2206.00364, table 1): (s^2 + sigma_data^2) / (s sigma_data)^2, s = sigma / alpha.

    That is SNR + 1 / sigma_data^2; the SNR is limited to 1e8.
    """
    return log_snr.exp().clamp(max=_GREATEST_SNR) + 1 / sigma_data**2


def min_snr_weight(log_snr: Tensor, gamma: float) -> Tensor:
    """Min-SNR-gamma weight of the squared error of x0: min(SNR, gamma) (arXiv:2303.09556, eq. 8)."""
    return log_snr.exp().clamp(max=gamma)


def denoising_loss(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Squared error averaged over C, H, W, times the weight [B] of the row: [B, ...] -> [B]."""
    return weight * (predicted - target).square().flatten(1).mean(1)


Weighting = Literal["uniform", "edm", "min_snr"]


def regressed(denoiser: Denoiser, sample: Noised, weighting: Weighting) -> Tensor:
    """The prediction [B, ...] whose error the weighting weighs: the network's own output ("uniform") or x0."""
    read = denoiser.raw if weighting == "uniform" else denoiser.x0
    return read(sample.x_t, sample.t, sample.condition)


def regression(denoiser: Denoiser, sample: Noised, weighting: Weighting, gamma: float) -> tuple[Tensor, Tensor]:
    """What `regressed` should be [B, ...], and the weight [B] of its squared error."""
    if weighting == "uniform":
        return denoiser.target(sample.x0, sample.eps, sample.t), torch.ones_like(sample.t)
    log_snr = denoiser.path.log_snr(sample.t)
    weight = edm_weight(log_snr, denoiser.path.sigma_data) if weighting == "edm" else min_snr_weight(log_snr, gamma)
    return sample.x0, weight


@register("diffusion")
@dataclass
class Diffusion(Method):
    """Denoising score matching (arXiv:2006.11239, arXiv:2206.00364).

    weighting "uniform": the network's own output meets its own target with weight 1: the simple loss of DDPM for "eps", EDM's loss for
    "edm". The others weigh the error of x0, whatever the network predicts.
    """

    roles: ClassVar[dict[str, Role]] = {"model": Trained(ema=True)}
    generator: ClassVar[str | None] = "model"
    weighs: ClassVar[bool] = True

    times: TimeLaw = option(Uniform, "law of the training times; log_normal for variance_exploding", source="arXiv:2006.11239")
    weighting: Weighting = option("uniform", "uniform (on the network's output), edm or min_snr (on x0)")
    gamma: PositiveFloat = option(5.0, "greatest weight of min_snr", source="arXiv:2303.09556")
    label_dropout: Fraction = option(0.1, "probability that a label becomes the null class", source="arXiv:2207.12598")

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("model", self.loss)

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        denoiser, path = nets.model, nets.model.path
        sample = noised(batch, noise, path, self.times, self.label_dropout)
        target, weight = regression(denoiser, sample, self.weighting, self.gamma)
        loss = weighed(denoising_loss(regressed(denoiser, sample, self.weighting), target, weight), batch)
        return Loss(loss.mean(), loss_by_noise_level(loss, path.log_snr(sample.t)))
