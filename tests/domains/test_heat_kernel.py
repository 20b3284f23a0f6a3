"""The kernel against 40-digit sums, and the identities that define it."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from gentrain.domains import heat_kernel
from gentrain.domains.box import Box

PLACES = [0.0, 1e-6, 0.003, 0.1, 0.37, 0.5, 0.81, 0.999, 1.0]
SIGMAS = [0.01, 0.03, 0.1, 0.14, 0.15, 0.17, 0.2, 0.25, 0.31, 0.33, 0.39, 0.4, 0.401, 0.45, 0.7, 1.0, 2.0, 5.0]


def grid(dtype):
    """x, x0 [N] over all pairs of places, rounded to dtype."""
    places = torch.tensor(PLACES, dtype=dtype)
    return places.repeat_interleave(len(places)), places.repeat(len(places))


def reference(x, x0, sigma):
    """(score, log density) by 26 images in 40 digits; for sigma > 1 by 20 eigenfunctions."""
    with mpmath.workdps(40):
        x, x0, sigma = (mpmath.mpf(float(value)) for value in (x, x0, sigma))
        if sigma > 1:
            amplitude = [2 * mpmath.exp(-((n * mpmath.pi * sigma) ** 2) / 2) * mpmath.cos(n * mpmath.pi * x0) for n in range(1, 20)]
            density = 1 + sum(a * mpmath.cos(n * mpmath.pi * x) for n, a in enumerate(amplitude, 1))
            slope = -sum(n * mpmath.pi * a * mpmath.sin(n * mpmath.pi * x) for n, a in enumerate(amplitude, 1))
            return float(slope / density), float(mpmath.log(density))
        images = [sign * x0 + 2 * k for k in range(-6, 7) for sign in (1, -1)]
        weights = [mpmath.exp(-((x - image) ** 2) / (2 * sigma**2)) for image in images]
        total = sum(weights)
        score = -sum(w * (x - image) for w, image in zip(weights, images)) / total / sigma**2
        return float(score), float(mpmath.log(total / (sigma * mpmath.sqrt(2 * mpmath.pi))))


# measured over the grid, largest, in units of 1 / sigma: 4.6e-6 (float32), 1.8e-14 (float64)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_score_and_density_meet_the_reference(sigma, dtype, tolerance):
    x, x0 = grid(dtype)
    level = torch.tensor(sigma, dtype=dtype)
    exact = torch.tensor([reference(a, b, level) for a, b in zip(x, x0)], dtype=torch.float64)
    error = (heat_kernel.score(x, x0, level).double() - exact[:, 0]).abs() * sigma
    assert error.max() < tolerance
    relative = (heat_kernel.log_density(x, x0, level).double() - exact[:, 1]).abs() / (1 + exact[:, 1].abs())
    assert relative.max() < tolerance


@pytest.mark.parametrize("low, high", [(0.01, 0.012), (0.012, 0.1), (0.1, 0.4), (0.4, 0.42), (0.42, 6.0)])
@pytest.mark.parametrize("law", ["uniform", "near the walls"])
def test_float32_is_right_to_a_hundred_thousandth_everywhere(low, high, law):
    """200,000 random x, x0, sigma a case. Measured over 600,000: 9.0e-6 near opposite walls at sigma = 0.01, else at most 5.5e-6; the
    rounding of the result is a half of it."""
    generator, count = torch.Generator().manual_seed(0), 200_000
    sigma = low * (high / low) ** torch.rand(count, generator=generator)
    x, x0 = torch.rand(2, count, generator=generator)
    if law != "uniform":
        x, x0 = (torch.where(p < 0.5, 10 ** (-8 * torch.rand(count, generator=generator)), 1 - 10 ** (-7 * p)) for p in (x, x0))
    exact = heat_kernel.score(x.double(), x0.double(), sigma.double())
    assert ((heat_kernel.score(x, x0, sigma).double() - exact) * sigma).abs().max() < 1e-5
    density = heat_kernel.log_density(x.double(), x0.double(), sigma.double())
    assert ((heat_kernel.log_density(x, x0, sigma).double() - density) / (1 + density.abs())).abs().max() < 1e-6
    box = Box(-1, 1)  # whose coordinates are rounded on their way to the unit interval
    x, x0 = (2 * p - 1 for p in (x, x0))
    exact = box.heat_kernel_score(x.double()[:, None], x0.double()[:, None], 2 * sigma.double())
    assert ((box.heat_kernel_score(x[:, None], x0[:, None], 2 * sigma).double() - exact)[:, 0] * 2 * sigma).abs().max() < 1e-5


def test_float32_where_a_density_of_1e_11_ruins_a_sum_of_eigenfunctions():
    """sigma = 0.15, x and x0 at opposite walls: the 20-term eigenfunction series in float32 errs by more than 1 / sigma there."""
    x, x0, sigma = torch.tensor([0.02]), torch.tensor([0.98]), torch.tensor(0.15)
    n = torch.arange(1, 21)
    amplitude = (-((n * math.pi * sigma).square()) / 2).exp() * (n * math.pi * x0).cos()
    naive = -2 * (n * math.pi * amplitude * (n * math.pi * x).sin()).sum() / (1 + 2 * (amplitude * (n * math.pi * x).cos()).sum() + 1e-12)
    exact = reference(x[0], x0[0], sigma)[0]
    assert abs(float(naive) - exact) * 0.15 > 1
    assert abs(float(heat_kernel.score(x, x0, sigma)) - exact) * 0.15 < 1e-5


def test_score_vanishes_at_both_walls():
    """Neumann's condition."""
    x0 = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    for sigma in SIGMAS:
        for wall in (0.0, 1.0):
            assert heat_kernel.score(torch.full_like(x0, wall), x0, torch.tensor(sigma, dtype=torch.float64)).abs().max() < 1e-10


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.39, 0.41, 1.0])
def test_density_integrates_to_one_is_symmetric_and_is_what_the_score_derives_from(sigma):
    level = torch.tensor(sigma, dtype=torch.float64)
    x = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for place in (0.0, 0.004, 0.3, 1.0):
        x0 = torch.tensor(place, dtype=torch.float64)
        density = heat_kernel.log_density(x, x0, level)
        assert abs(float(density.exp().mean()) - 1) < 1e-8  # midpoint rule, exact for the even periodic continuation
        assert torch.allclose(density, heat_kernel.log_density(x0.expand_as(x), x, level), rtol=1e-12, atol=1e-12)
        step = 2e-7
        inner = x[10:-10]
        slope = (heat_kernel.log_density(inner + step, x0, level) - heat_kernel.log_density(inner - step, x0, level)) / (2 * step)
        assert ((slope - heat_kernel.score(inner, x0, level)).abs() * sigma).max() < 1e-5


def test_steps_add_up_in_variance():
    """The semigroup: a step of sigma 0.3 and one of 0.3 make one of sqrt(0.18), across the switch between the series."""
    y = (torch.arange(4_000, dtype=torch.float64) + 0.5) / 4_000
    x, x0 = torch.tensor(0.07, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    two = (
        (heat_kernel.log_density(y, x0, torch.tensor(0.3).double()) + heat_kernel.log_density(x, y, torch.tensor(0.3).double()))
        .exp()
        .mean()
    )
    one = heat_kernel.log_density(x, x0, torch.tensor(0.18, dtype=torch.float64).sqrt()).exp()
    assert abs(float(two / one) - 1) < 1e-6


def test_a_box_of_any_width_and_a_sigma_per_sample():
    box = Box(-1, 3)
    generator = torch.Generator().manual_seed(0)
    x, x0 = (4 * torch.rand(2, 6, 3, generator=generator, dtype=torch.float64) - 1).unbind()
    sigma = torch.tensor([0.05, 0.4, 1.0, 1.5, 3.0, 9.0], dtype=torch.float64)
    score, density = box.heat_kernel_score(x, x0, sigma), box.heat_kernel_log_density(x, x0, sigma)
    for row in range(6):
        expected = heat_kernel.score((x[row] + 1) / 4, (x0[row] + 1) / 4, sigma[row] / 4) / 4
        assert torch.allclose(score[row], expected, rtol=1e-12)
        alone = box.heat_kernel_log_density(x[row : row + 1], x0[row : row + 1], float(sigma[row]))
        assert torch.allclose(density[row : row + 1], alone, rtol=1e-12)
    step = 1e-6
    slope = (box.heat_kernel_log_density(x + step, x0, sigma) - box.heat_kernel_log_density(x - step, x0, sigma)) / (2 * step)
    assert torch.allclose(slope, score, atol=1e-5)
