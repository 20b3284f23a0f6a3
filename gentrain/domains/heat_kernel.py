"""The reflected heat kernel of an interval: the transition density of Brownian motion between two mirrors (arXiv:2304.04740).

Everything is per coordinate: x and x0 in [0, 1], sigma > 0 of the unreflected normal step, all broadcast against each other.

Two series, each where it needs few terms. Up to sigma = 0.4 images, in pairs +-d about the wall nearer to x, d = x0, 2 - x0, 2 + x0 (in
float64 also 4 - x0) as measured from it, their weights relative to that of x0 itself: nothing underflows and nothing is divided by zero.
Above it eigenfunctions: 1 + 2 sum over n up to 5 (6) of exp(-n^2 pi^2 sigma^2 / 2) cos(n pi x) cos(n pi x0). What either leaves out is
below 1e-8 (1e-12) of the density.

In float32 the score is right to 1e-5 / sigma for sigma >= 0.01: at opposite walls it is a hundred times 1 / sigma there and has one
rounding to spare, so that weights are summed in float64. Below that level the rounding of the result, 6e-8 / sigma^2, is all of the error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

SWITCH = 0.4  # below 0.35 a float32 sum of eigenfunctions loses too many digits where the density is 0.05
_EIGEN_TERMS, _EIGEN_TERMS_FLOAT64 = 5, 6


def score(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """d log p(x | x0) / dx. Zero at both walls."""
    below, above = sigma.clamp(max=SWITCH), sigma.clamp(min=SWITCH)
    upper, near, place = _from_the_nearer_wall(x, x0)
    total, moment = torch.zeros_like(near), torch.zeros_like(near)
    for weight, mirrored, distance in _pairs(near, place, below, x.dtype):
        total = total + weight * (1 + mirrored)
        moment = moment + weight * (1 - mirrored) * distance
    images = ((moment / total - near) / below.double().square()).to(x.dtype)
    density, slope = torch.ones_like(x), torch.zeros_like(x)
    for number, amplitude, cosine, sine in _eigenfunctions(near.to(x.dtype), place.to(x.dtype), above):
        density = density + amplitude * cosine
        slope = slope - (number * math.pi) * amplitude * sine
    result = torch.where(sigma <= SWITCH, images, slope / density)
    return torch.where(upper, -result, result)


def log_density(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """log p(x | x0)."""
    below, above = sigma.clamp(max=SWITCH), sigma.clamp(min=SWITCH)
    _, near, place = _from_the_nearer_wall(x, x0)
    total = sum((weight * (1 + mirrored) for weight, mirrored, _ in _pairs(near, place, below, x.dtype)), torch.zeros_like(near))
    level = below.double()
    images = -((near - place) / level).square() / 2 - (level * math.sqrt(2 * math.pi)).log() + total.log()
    terms = _eigenfunctions(near.to(x.dtype), place.to(x.dtype), above)
    density = sum((amplitude * cosine for _, amplitude, cosine, _ in terms), torch.ones_like(x))
    return torch.where(sigma <= SWITCH, images.to(x.dtype), density.log())


def _from_the_nearer_wall(x: Tensor, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(whether x is nearer to the wall at 1, x and x0 as distances from the wall that x is nearer to, float64)."""
    upper, x, x0 = x > 0.5, x.double(), x0.double()
    return upper, torch.where(upper, 1 - x, x), torch.where(upper, 1 - x0, x0)


def _pairs(x: Tensor, x0: Tensor, sigma: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(weight of the image at d relative to that of x0, weight of the one at -d relative to it, d), float64, for x <= 1/2.

    The exponents are differences of squares, factored: subtracting the squares would cost the digits that the score needs near a wall.
    They and the exponentials, which take most of the time, are of `dtype`.
    """
    scale = (-2 / sigma.double().square()).to(dtype)
    near, far, place, rest = (value.to(dtype) for value in (x, 1 - x, x0, 1 - x0))
    pull = scale * near
    yield torch.ones_like(x), (pull * place).exp().double(), x0
    yield (scale * (far * rest)).exp().double(), (pull * (1 + rest)).exp().double(), 2 - x0
    yield (scale * (far + place)).exp().double(), (pull * (2 + place)).exp().double(), 2 + x0
    if dtype == torch.float64:
        yield (scale * ((1 + far) * (1 + rest))).exp(), (pull * (3 + rest)).exp(), 4 - x0


def _eigenfunctions(x: Tensor, x0: Tensor, sigma: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(n, 2 exp(-n^2 pi^2 sigma^2 / 2) cos(n pi x0), cos(n pi x), sin(n pi x)), by Chebyshev's recurrence, for x <= 1/2."""
    first, first0 = (math.pi * x).cos(), (math.pi * x0).cos()
    before, cosine, before0, cosine0 = torch.ones_like(x), first, torch.ones_like(x0), first0
    sine_before, sine = torch.zeros_like(x), (math.pi * x).sin()
    for number in range(1, (_EIGEN_TERMS_FLOAT64 if x.dtype == torch.float64 else _EIGEN_TERMS) + 1):
        yield number, 2 * (-(number * math.pi * sigma).square() / 2).exp() * cosine0, cosine, sine
        before, cosine = cosine, 2 * first * cosine - before
        before0, cosine0 = cosine0, 2 * first0 * cosine0 - before0
        sine_before, sine = sine, 2 * first * sine - sine_before
