from __future__ import annotations

from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gentrain.config import ConfigError, Document, build
from gentrain.domains.base import Domain
from gentrain.domains.box import Box
from gentrain.noise import Noise


def mirrored(value: float, low: float, high: float) -> tuple[Fraction, bool]:
    """Exact: where the point ends and whether by an odd number of mirrors."""
    y, low, high = Fraction(value), Fraction(low), Fraction(high)
    number = (y - low) // (high - low)
    rest = y - low - number * (high - low)
    return (high - rest, True) if number % 2 else (low + rest, False)


@given(st.floats(-1e6, 1e6), st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.25, 4.0), (-3.0, -2.875)]))
@settings(max_examples=300, deadline=None)
def test_folding_meets_exact_arithmetic(value, bounds):
    folded, odd = Box(*bounds).fold(torch.tensor([[value]], dtype=torch.float64))
    exact, parity = mirrored(value, *bounds)
    assert abs(Fraction(float(folded)) - exact) <= Fraction(4e-16) * (4 + abs(Fraction(value)))
    near_a_wall = min(exact - Fraction(bounds[0]), Fraction(bounds[1]) - exact) < Fraction(1e-9)
    assert near_a_wall or bool(odd) == parity


def test_folding_of_small_steps_past_a_wall_keeps_their_digits():
    box = Box()
    x = torch.tensor([[-1e-9], [-1e-30], [1 + 2**-23], [2 - 2**-23], [-(2.0**-24)]])
    assert torch.equal(box.fold(x)[0], torch.tensor([[1e-9], [1e-30], [1 - 2**-23], [2**-23], [2.0**-24]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (0.1, 0.7), (-1e-3, 1e-3)])
def test_points_on_walls_become_the_neighbours_inside(bounds, dtype):
    """Folding lands on a wall for multiples of the width, and for about 7 in 1e8 random float32 numbers."""
    low, high = bounds
    multiples = (low + (high - low) * torch.arange(-6, 7, dtype=torch.float64))[:, None]
    folded = Box(*bounds).fold(multiples.to(dtype))[0]
    assert folded.dtype == dtype
    assert (folded.double() > low).all() and (folded.double() < high).all()
    assert (folded > torch.tensor(low, dtype=torch.float64).to(dtype)).all() and (
        folded < torch.tensor(high, dtype=torch.float64).to(dtype)
    ).all()
    at_walls = Box(*bounds).interior(torch.tensor([[low], [high]], dtype=torch.float64).to(dtype)).double()
    spacing = torch.finfo(dtype).eps * max(abs(low), abs(high))
    assert ((at_walls - torch.tensor([[low], [high]], dtype=torch.float64)).abs() <= 2 * spacing).all()


def test_next_to_zero_lies_no_subnormal_which_devices_flush_to_it():
    tiny = torch.finfo(torch.float32).tiny
    assert Box(0.0, 1.0).interior(torch.zeros(1, 1)).item() == tiny and Box(-1.0, 0.0).interior(torch.zeros(1, 1)).item() == -tiny
    assert Box().reflect(torch.tensor([[2.0]])).item() == tiny


def test_inside_nothing_is_changed_and_velocities_turn_on_odd_folds_only():
    box = Box(-1, 1)
    x = torch.rand(1000, 3, generator=torch.Generator().manual_seed(0)) * 1.999 - 0.9995
    assert torch.equal(box.reflect(x), x)
    outside = torch.tensor([[-1.5, 0.5, 1.5, 3.5, -3.5]])
    folded, velocity = box.reflect_with_velocity(outside, torch.full((1, 5), 2.0))
    assert torch.equal(folded, torch.tensor([[-0.5, 0.5, 0.5, -0.5, 0.5]]))
    assert torch.equal(velocity, torch.tensor([[-2.0, 2.0, -2.0, 2.0, 2.0]]))


def test_folded_normal_steps_follow_the_heat_kernel():
    """Kolmogorov and Smirnov's statistic of 20,000 folded steps against the integrated kernel; measured 0.003 to 0.008."""
    box, sigma, count = Box(), 0.4, 20_000
    noise = Noise(0, torch.arange(count))
    x = box.reflect(0.2 + sigma * noise.normal((count, 1), torch.float64))[:, 0].sort().values
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    law = (
        box.heat_kernel_log_density(grid[:, None], torch.full((20_000, 1), 0.2, dtype=torch.float64), sigma)[:, 0].exp().cumsum(0) / 20_000
    )
    steps = (torch.arange(count) + 0.5) / count
    assert (law[(x * 20_000).long()] - steps).abs().max() < 1.63 / count**0.5


def test_uniform_numbers_never_touch_a_wall():
    class Zero(Noise):
        def uniform(self, shape, low=0.0, high=1.0):
            return torch.tensor([0.0, 1 - 2**-24]).expand(shape)

    for bounds in ((0, 1), (-1, 1), (0.3, 0.30001)):
        x = Box(*bounds).uniform(Zero(0, torch.arange(4)), (4, 2))
        assert x.dtype == torch.float32 and Box(*bounds).contains(x).all()


@pytest.mark.parametrize("kappa", [0.05, 0.1, 0.3, 0.9])
def test_the_inverse_meets_forty_digits(kappa):
    box = Box(0.0, 1.0, kappa=kappa)
    duals = [0.0, 0.3, 0.5, 2.0, -7.0, 40.0, 1e3, -1e3]
    x, log_slack = box.to_primal(torch.tensor(duals, dtype=torch.float64)[:, None])
    with mpmath.workdps(400):
        for row, z in enumerate(duals):
            power = mpmath.mpf(kappa)

            def residual(v, z=z, power=power):
                below, above = 1 / (1 + mpmath.exp(-v)), 1 / (1 + mpmath.exp(v))
                return below + above**-power - below**-power - z

            furthest = mpmath.log(2 + abs(mpmath.mpf(z))) / power
            v = mpmath.findroot(residual, (-furthest, furthest), solver="anderson", tol=1e-60, maxsteps=500)
            assert abs(float(x[row]) - float(1 / (1 + mpmath.exp(-v)))) < 1e-14
            for column, sign in enumerate((-1, 1)):
                exact = float(-mpmath.log1p(mpmath.exp(sign * v)))
                assert abs(float(log_slack[row, column]) - exact) < 1e-11 * (1 + abs(exact))


def test_the_log_barrier_is_kappa_1_and_atanh_its_own_inverse():
    x = torch.tensor([[0.2, 0.9]], dtype=torch.float64)
    assert torch.allclose(Box(barrier="log").to_dual(x), x + 1 / (1 - x) - 1 / x)
    assert torch.allclose(Box(barrier="atanh").to_dual(x), torch.atanh(2 * x - 1))
    far, log_slack = Box(barrier="atanh").to_primal(torch.tensor([[400.0, -400.0]], dtype=torch.float64))
    assert torch.allclose(log_slack, torch.tensor([[0.0, -800.0, -800.0, 0.0]], dtype=torch.float64))
    assert Box().contains(far).all()


def test_it_is_configured_by_name_and_checked():
    box = build(Domain, Document({"name": "box", "low": -1, "high": [1, 2]}, "x.yaml"))
    assert box == Box(-1.0, [1.0, 2.0])
    for values, message in (({"low": 1, "high": 0}, "low must be below high"), ({"low": [0, 0], "high": [1, 1, 1]}, "equal length")):
        with pytest.raises(ConfigError, match=message):
            build(Domain, Document({"name": "box", **values}, "x.yaml"))
    with pytest.raises(ConfigError, match="kappa"):
        build(Domain, Document({"name": "box", "kappa": 1.0}, "x.yaml"))
