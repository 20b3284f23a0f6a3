"""What the methods that regress a denoiser on noised data share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from gentrain.config import Fraction
from gentrain.methods.base import Batch, condition_of
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser, drop_condition
from gentrain.noise import Noise
from gentrain.paths.base import Path, TimeLaw


@dataclass(frozen=True)
class Noised:
    """Data in the path's coordinates [B, ...], the noise eps [B, ...] and time t [B] they met, x_t [B, ...], the condition then."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    x_t: Tensor
    condition: Condition | None


def noised(batch: Batch, noise: Noise, path: Path, times: TimeLaw, label_dropout: Fraction) -> Noised:
    """Noises a batch at times drawn from the law `times`; labels become the null class with probability `label_dropout`."""
    x0 = path.space.encode(batch["x"])
    t = times.sample(noise.uniform((len(x0),)), path)
    eps = path.draw_eps(noise, tuple(x0.shape))
    condition = condition_of(batch)
    if condition is not None:
        condition = drop_condition(condition, noise.bernoulli(label_dropout, (len(x0),)))
    return Noised(x0, eps, t, path.perturb(x0, eps, t), condition)


def output_error(denoiser: Denoiser, sample: Noised) -> Tensor:
    """Squared error of the network's own output against its own target, the mean over C, H, W: [B]."""
    target = denoiser.target(sample.x0, sample.eps, sample.t)
    return (denoiser.raw(sample.x_t, sample.t, sample.condition) - target).square().flatten(1).mean(1)


def loss_by_noise_level(loss: Tensor, log_snr: Tensor) -> dict[str, Tensor]:
    """What the rows of low (sigma < alpha / 3), high (sigma > 3 alpha) and medium noise add to the mean loss; the three sum to it.

    loss and log_snr are [B]. Shares, not means per level, because these average exactly over ranks and micro-batches and are never 0 / 0.
    """
    low, high = log_snr > 2 * math.log(3), log_snr < -2 * math.log(3)
    loss = loss.detach()
    return {
        "loss_low_noise": (loss * low).mean(),
        "loss_medium_noise": (loss * ~(low | high)).mean(),
        "loss_high_noise": (loss * high).mean(),
    }
