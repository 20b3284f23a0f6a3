"""How far one diffusion model is from another, without a reference set: a bound on the divergence of their laws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise

NOISES = (0.02, 80.0)  # noise-to-signal ratios between which models are compared: below, eps is hardly to be seen; above, the data are not


def divergence_bound(
    truth: Denoiser, other: Denoiser, x0: Tensor, noise: Noise, condition: Condition | None = None, draws: int = 8
) -> Tensor:
    """Its mean over samples x0 [B, ...] of `truth` estimates 1/2 int E |eps_other(x_t) - eps_truth(x_t)|^2 d log SNR: [B], nats.

    x_t are the samples, noised. The integral goes over noise-to-signal ratios sigma / alpha from 0.02 to 80 and has the likelihood's weight
    1/2 g^2 |score difference|^2 dt, written in log SNR = 2 log(alpha / sigma) (arXiv:2107.00630, eq. 15). By Girsanov's theorem it is the
    KL divergence of the reverse diffusion of `truth` from that of `other` over these noises, both begun with the same noise, so it bounds
    KL(truth || other) of the laws at ratio 0.02 from above (arXiv:2101.09258, theorem 2); of two models that both know the score of
    their own law it is KL at ratio 0.02 minus KL at ratio 80, exactly. It assumes that noised samples of `truth` are distributed as its
    reverse diffusion passes them.

    The levels of a sample are equally spaced in log SNR from a random first one.

    Args:
        truth, other: on one path, not guided.
        condition: of the samples; given to both.
    """
    path = truth.path
    ends = torch.tensor([-2 * math.log(ratio) for ratio in reversed(NOISES)], dtype=torch.float64)
    low, high = path.log_snr(path.time_of_log_snr(ends)).tolist()  # the path's own where it ends before
    first = noise.uniform((len(x0),)).to(x0.dtype)
    total = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    for number in range(draws):
        t = path.time_of_log_snr(low + (high - low) * (first + number / draws).remainder(1))
        x_t = path.perturb(x0, noise.normal(tuple(x0.shape), x0.dtype), t)
        difference = other.eps(x_t, t, condition) - truth.eps(x_t, t, condition)
        total += (high - low) / (2 * draws) * difference.double().square().flatten(1).sum(1)
    return total
