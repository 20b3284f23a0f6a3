"""How likely data are under a reflected diffusion: the variational bound, and the exact likelihood of the probability flow.

Both are natural logarithms of densities of the path's coordinates, per sample; `bits_per_dim` turns them into what papers report.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gentrain.domains.box import Box
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.reflected_heat import ReflectedHeat


def bits_per_dim(nats: Tensor, dim: int) -> Tensor:
    """Negative log densities or probabilities [B] (nats) of `dim` coordinates -> bits per coordinate."""
    return nats / (dim * math.log(2))


def level_points(box: Box, levels: int, like: Tensor) -> Tensor:
    """Where data of so many levels lie, the outermost on the walls: [levels], float64. The box has the same walls in every coordinate."""
    low, high = box.bounds(like)
    if low.ndim or high.ndim:
        raise ValueError("levels need a box whose walls are the same in every coordinate")
    return low + (high - low) * torch.arange(levels, dtype=torch.float64, device=like.device) / (levels - 1)


def dequantised(box: Box, x: Tensor, levels: int, noise: Noise) -> tuple[Tensor, float]:
    """(x uniform in the cell of its level, nats by which a coordinate's probability is more than its density there).

    x [B, ...] lies on `level_points`; the cells, one for each level, divide the box evenly.
    """
    points = level_points(box, levels, x)
    width = float(points[-1] - points[0])
    place = (x.double() - points[0]) / width * (levels - 1)
    spread = points[0] + width * (place.round() + noise.uniform(tuple(x.shape)).double()) / levels
    return box.interior(spread.to(x.dtype)), math.log(width / levels)


def variational_bound(
    denoiser: Denoiser, x: Tensor, noise: Noise, condition: Condition | None = None, draws: int = 16, levels: int | None = None
) -> Tensor:
    """An upper bound of -log p(x), from `draws` random times for each sample: x [B, ...] in coordinates -> [B], nats.

    E[-log k(x | x_0')] + 1/2 int_0^1 g^2 E |score - kernel score|^2 dt (arXiv:2304.04740, section 3.4): the decoder k from the path's
    lowest noise level is its own kernel, which is symmetric; that the law at t = 1 is not quite uniform adds less than
    exp(-(pi sigma_max / width)^2). The times of a sample are equally spaced from a random first one.

    With `levels` x lies on so many (`level_points`) and p is a probability: the decoder is k(x | x_0') over its sum at all levels, so that
    nothing need be dequantised (Kingma et al. 2021, arXiv:2107.00630, section 3.3).
    """
    path = _path(denoiser)
    first = noise.uniform((len(x),))
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for number in range(draws):
        t = (first + number / draws).remainder(1)
        sigma = path.sigma(t)
        x_t = path.perturb(x, noise.normal(tuple(x.shape), x.dtype), t)
        error = denoiser.score(x_t, t, condition) - path.box.heat_kernel_score(x_t, x, sigma)
        total += path.log_range * sigma.square() * error.square().flatten(1).sum(1) / draws
        start = path.perturb(x, noise.normal(tuple(x.shape), x.dtype), torch.zeros_like(t))
        decoded = path.box.heat_kernel_log_density(start, x, path.sigma_min)
        if levels is not None:
            decoded = decoded - _log_sum_over_levels(path, start, levels)
        total -= decoded.flatten(1).sum(1) / draws
    return total


def _log_sum_over_levels(path: ReflectedHeat, x: Tensor, levels: int) -> Tensor:
    """log of the sum of k(level | x) over all levels, of each coordinate: [B, ...]."""
    total = torch.full_like(x, -torch.inf)
    for point in level_points(path.box, levels, x).tolist():
        total = torch.logaddexp(total, path.box.heat_kernel_log_density(x, torch.full_like(x, point), path.sigma_min))
    return total


def flow_log_density(
    denoiser: Denoiser, x: Tensor, noise: Noise, condition: Condition | None = None, steps: int = 100, probes: int = 0
) -> Tensor:
    """log p(x) of the probability flow, x [B, ...] in coordinates at the path's lowest noise level -> [B], nats.

    Heun steps in t up to t = 1, where the law is uniform, reflected at the walls; folding keeps volumes, so that only the divergence of the
    velocity changes the density (arXiv:2304.04740, section 4.3).

    Args:
        probes: random vectors for each divergence (Hutchinson); 0 = exact, one backward pass per coordinate.
    """
    path = _path(denoiser)
    log_density = torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def at(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        time = x.new_full((len(x),), t)
        return with_divergence(lambda y: denoiser.velocity(y, time, condition), x, noise, probes)

    h = 1 / steps
    for step in range(steps):
        first, divergence = at(x, step * h)
        there, mirrored = path.box.reflect_with_velocity(x + h * first, first, x)
        second, divergence_there = at(there, (step + 1) * h)
        x = path.box.reflect(there + h / 2 * (second - mirrored), there)
        log_density += h / 2 * (divergence + divergence_there)
    return log_density - _log_volume(path.box, x)


def with_divergence(field: Callable[[Tensor], Tensor], x: Tensor, noise: Noise, probes: int) -> tuple[Tensor, Tensor]:
    """The field at x and its divergence [B]."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = field(x)
        divergence = x.new_zeros(len(x))
        if probes:
            for _ in range(probes):
                probe = 2 * noise.bernoulli(0.5, tuple(x.shape)).to(x.dtype) - 1
                (gradient,) = torch.autograd.grad((value * probe).sum(), x, retain_graph=True)
                divergence += (gradient * probe).flatten(1).sum(1) / probes
        else:
            for index in range(x[0].numel()):
                (gradient,) = torch.autograd.grad(value.flatten(1)[:, index].sum(), x, retain_graph=True)
                divergence += gradient.flatten(1)[:, index]
    return value.detach(), divergence


def _log_volume(box: Box, x: Tensor) -> Tensor:
    below, above = box.slack(x).chunk(2, 1)
    return (below + above).double().log().sum(1)


def _path(denoiser: Denoiser) -> ReflectedHeat:
    if not isinstance(denoiser.path, ReflectedHeat):
        raise ValueError(f"likelihoods are those of the path reflected_heat, not of {denoiser.path.registered_name}")
    return denoiser.path
