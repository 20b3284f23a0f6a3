"""The reflected heat kernel of an interval: the transition density of Brownian motion between two mirrors (arXiv:2304.04740).

Everything is per coordinate: x and x0 in [0, 1], sigma > 0 of the unreflected normal step, all broadcast against each other.

Two series, each where it needs few terms. Up to sigma = 0.316 images: x0, x0 - 2, x0 + 2, -x0, 2 - x0, -2 - x0 and
4 - x0, a choice that each wall maps to itself but for terms below rounding, their weights relative to the nearest, which is x0 itself, so
that nothing underflows and nothing is divided by zero. Above it eigenfunctions:
1 + 2 sum over n up to 8 of exp(-n^2 pi^2 sigma^2 / 2) cos(n pi x) cos(n pi x0). What either leaves out is below 1e-12 of the density.

In float32 the score is right to 1e-5 / sigma for sigma >= 0.01; below that rounding of x itself, 6e-8 / sigma^2, is all of the error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

SWITCH = 0.1**0.5  # sigma^2 / 2 = 0.05
_EIGEN_TERMS = 8


def score(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """d log p(x | x0) / dx. Zero at both walls."""
    below, above = sigma.clamp(max=SWITCH), sigma.clamp(min=SWITCH)
    total, moment = torch.ones_like(x), torch.zeros_like(x)
    for weight, shift in _images(x, x0, below):
        total = total + weight
        moment = moment + weight * shift
    images = -(x - x0 + moment / total) / below.square()
    density, slope = torch.ones_like(x), torch.zeros_like(x)
    for number, amplitude, cosine, sine in _eigenfunctions(x, x0, above):
        density = density + amplitude * cosine
        slope = slope - (number * math.pi) * amplitude * sine
    return torch.where(sigma <= SWITCH, images, slope / density)


def log_density(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """log p(x | x0)."""
    below, above = sigma.clamp(max=SWITCH), sigma.clamp(min=SWITCH)
    total = sum((weight for weight, _ in _images(x, x0, below)), torch.ones_like(x))
    images = -((x - x0) / below).square() / 2 - (below * math.sqrt(2 * math.pi)).log() + total.log()
    density = sum((amplitude * cosine for _, amplitude, cosine, _ in _eigenfunctions(x, x0, above)), torch.ones_like(x))
    return torch.where(sigma <= SWITCH, images, density.log())


def _images(x: Tensor, x0: Tensor, sigma: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(weight relative to that of x0, (x - image) - (x - x0)) of the six other images.

    The exponents are differences of squares, factored: subtracting the squares would cost the digits that the score needs near a wall.
    """
    scale = -2 / sigma.square()
    one = 1 - x0
    yield (scale * (x * x0)).exp(), 2 * x0
    yield (scale * ((1 - x) * one)).exp(), -2 * one
    yield (scale * (x + one)).exp(), torch.full_like(x0, 2)
    yield (scale * ((1 - x) + x0)).exp(), torch.full_like(x0, -2)
    yield (scale * ((1 + x) * (1 + x0))).exp(), 2 + 2 * x0
    yield (scale * ((2 - x) * (1 + one))).exp(), -2 - 2 * one


def _eigenfunctions(x: Tensor, x0: Tensor, sigma: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(n, 2 exp(-n^2 pi^2 sigma^2 / 2) cos(n pi x0), cos(n pi x), sin(n pi x)), by Chebyshev's recurrence."""
    first, first0 = (math.pi * x).cos(), (math.pi * x0).cos()
    before, cosine, before0, cosine0 = torch.ones_like(x), first, torch.ones_like(x0), first0
    sine_before, sine = torch.zeros_like(x), (math.pi * torch.minimum(x, 1 - x)).sin()  # exactly 0 at both walls
    for number in range(1, _EIGEN_TERMS + 1):
        yield number, 2 * (-(number * math.pi * sigma).square() / 2).exp() * cosine0, cosine, sine
        before, cosine = cosine, 2 * first * cosine - before
        before0, cosine0 = cosine0, 2 * first0 * cosine0 - before0
        sine_before, sine = sine, 2 * first * sine - sine_before
