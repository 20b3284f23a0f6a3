"""How likely data are under a diffusion or flow model without walls: the variational bound, and the probability flow's likelihood.

Both are written in y = x_t / alpha and the noise-to-signal ratio u = sigma / alpha, in which all these paths are one, y = x + u eps: a
number of one path can be compared with that of another. The model's own law begins with y normal at the greatest ratio. Densities are of
the data as they come, in natural logarithms per sample.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gentrain.domains.box import Box
from gentrain.metrics.likelihood import level_points, with_divergence
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path, expand
from gentrain.paths.reflected_heat import ReflectedHeat

RATIOS = (0.002, 80.0)  # between which noise is looked at, where the path does not end before: EDM's (arXiv:2206.00364, table 1)
IMAGES = Box(-1.0, 1.0)  # the walls between which images have their levels


def variational_bound(
    denoiser: Denoiser, x: Tensor, noise: Noise, condition: Condition | None = None, draws: int = 16, levels: int | None = None
) -> Tensor:
    """An upper bound of -log p(x), from `draws` noise levels for each sample: x [B, ...] -> [B] float64, nats.

    KL of the noisiest y from the prior + 1/2 int E |eps - predicted|^2 d log SNR + E[-log p(x | least noisy y)] (arXiv:2107.00630, eq. 11
    and 15). The decoder is normal around the least noisy y with its ratio as deviation; with `levels` x lies on so many from -1 to 1 and p
    is a probability: the decoder is that density over its sum at all levels. The levels of noise of a sample are equally spaced in log SNR
    from a random first one. The bound is tight for a model that knows its law's score, up to the decoder.
    """
    least, most = ratios(denoiser.path)
    low, high = -2 * math.log(most), -2 * math.log(least)
    first, dim = noise.uniform((len(x),)).double(), x[0].numel()
    total = x.double().square().flatten(1).sum(1) / (2 * most**2)  # the prior's deviation is that of y's noise
    for number in range(draws):
        log_snr = low + (high - low) * (first + number / draws).remainder(1)
        t, eps = denoiser.path.time_of_log_snr(log_snr).to(x.dtype), noise.normal(tuple(x.shape), x.dtype)
        error = (denoiser.eps(denoiser.path.perturb(x, eps, t), t, condition) - eps).double().square().flatten(1).sum(1)
        total += (high - low) / (2 * draws) * error
        if levels is not None:
            total += _decoding(x, least, noise, levels) / draws
    return total if levels is not None else total + dim / 2 * (1 + math.log(2 * math.pi * least**2))


def _decoding(x: Tensor, ratio: float, noise: Noise, levels: int) -> Tensor:
    """-log p(level | y) of the least noisy y, summed over coordinates: [B]."""
    points = level_points(IMAGES, levels, x)
    y = x + ratio * noise.normal(tuple(x.shape), x.dtype)

    def log_weight(level: Tensor) -> Tensor:
        return -((y - level).double().square()) / (2 * ratio**2)

    every = torch.full_like(y, -torch.inf, dtype=torch.float64)
    for point in points:
        every = torch.logaddexp(every, log_weight(point))
    return (every - log_weight(x)).flatten(1).sum(1)


def flow_log_density(
    denoiser: Denoiser, x: Tensor, noise: Noise, condition: Condition | None = None, steps: int = 100, probes: int = 0
) -> Tensor:
    """log p(x) of the probability flow, x [B, ...] taken as y at the least ratio -> [B] float64, nats.

    Heun steps of dy / du = eps up to the greatest ratio, equally spaced in u^(1/7), and the integral of the divergence on the way
    (arXiv:2011.13456, eq. 39; arXiv:2206.00364, eq. 4 and 5).

    Args:
        probes: random vectors for each divergence (Hutchinson); 0 = exact, one backward pass per coordinate.
    """
    import torchdiffeq  # loads scipy

    path, dtype = denoiser.path, x.dtype
    least, most = (ratio ** (1 / 7) for ratio in ratios(path))
    grid = torch.linspace(least, most, steps + 1, dtype=torch.float64, device=x.device) ** 7

    def field(u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        t = path.time_of_log_snr(-2 * u.log()).to(dtype).expand(len(x))
        return with_divergence(lambda y: denoiser.eps(expand(path.alpha(t), y) * y, t, condition), state[0].to(dtype), noise, probes)

    start = (x.double(), x.new_zeros(len(x), dtype=torch.float64))
    ends = torchdiffeq.odeint(field, start, grid[[0, -1]], method="heun2", options={"grid_constructor": lambda *_: grid})
    y, log_density = (end[-1] for end in ends)
    normal = -y.square().flatten(1).sum(1) / (2 * float(grid[-1]) ** 2) - x[0].numel() * math.log(math.sqrt(2 * math.pi) * float(grid[-1]))
    return log_density + normal


def ratios(path: Path) -> tuple[float, float]:
    """The least and the greatest sigma / alpha at which a path is looked at. Raises ValueError for one with walls."""
    if isinstance(path, ReflectedHeat):
        raise ValueError(f"{path.registered_name} has walls, and no noise that is normal")
    ends = torch.tensor([-2 * math.log(ratio) for ratio in RATIOS], dtype=torch.float64)
    least, most = (-path.log_snr(path.time_of_log_snr(ends)) / 2).exp().tolist()
    return least, most
