from __future__ import annotations

import mpmath
import pytest
import torch

from gentrain.config import ConfigError, Document, build
from gentrain.domains.ball import Ball
from gentrain.domains.base import Domain
from gentrain.noise import Noise


def test_reflection_keeps_angular_momentum_and_the_length_of_the_way():
    """What determines the end of a path in a disc; 2,000 paths of up to 8 radii."""
    ball, count = Ball(1.5), 2_000
    noise = Noise(0, torch.arange(count))
    start = ball.uniform(noise, (count, 2), torch.float64)
    way = 3 * noise.normal((count, 2), torch.float64)
    end, velocity = ball.reflect_with_velocity(start + way, way, start)
    momentum = start[:, 0] * way[:, 1] - start[:, 1] * way[:, 0]
    after = end[:, 0] * velocity[:, 1] - end[:, 1] * velocity[:, 0]
    assert torch.allclose(after, momentum, atol=1e-9)
    # backwards from the end, the particle returns to where it came from
    back = ball.reflect(end - velocity, end)
    few_walls = way.norm(dim=1) < 8 * (1.5**2 - (momentum / way.norm(dim=1)).square()).sqrt()
    assert few_walls.sum() > 1_500 and torch.allclose(back[few_walls], start[few_walls], atol=1e-8)


def test_a_ball_without_boundary_is_refused():
    with pytest.raises(ConfigError, match="radius: expected a number > 0, got inf"):
        build(Domain, Document({"name": "ball", "radius": float("inf")}, "x.yaml"))


def test_from_the_centre_a_ray_comes_back_on_itself():
    x = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, -6.5]], dtype=torch.float64)
    assert torch.allclose(Ball(2.0).reflect(x), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.5]], dtype=torch.float64))


def test_uniform_points_fill_the_ball():
    count, dim = 20_000, 6
    x = Ball(3.0).uniform(Noise(0, torch.arange(count)), (count, dim))
    mass = (x.norm(dim=1) / 3) ** dim
    steps = (torch.arange(count) + 0.5) / count
    assert (mass.sort().values - steps).abs().max() < 1.63 / count**0.5
    assert x.mean(0).abs().max() < 0.05
    assert (x.square().sum(1) < 9).all()


@pytest.mark.parametrize("kappa, radius", [(0.05, 1.0), (0.1, 12.0), (0.5, 5.0), (0.3, 0.01)])
def test_the_inverse_meets_forty_digits(kappa, radius):
    norms = [1e-6, 0.01, 1.0, 3.0, 12.0, 300.0, 1e5]
    z = torch.zeros(len(norms), 3, dtype=torch.float64)
    z[:, 1] = -torch.tensor(norms, dtype=torch.float64)
    x, log_slack = Ball(radius, kappa=kappa).to_primal(z)
    with mpmath.workdps(600):
        for row, norm in enumerate(norms):
            power, size = mpmath.mpf(kappa), mpmath.mpf(radius)

            def residual(u, norm=norm, power=power, size=size):
                return size * mpmath.tanh(u) * (1 + 2 * (size / mpmath.cosh(u)) ** (-2 * power)) - mpmath.mpf(norm)

            most = 3 + mpmath.log(1 + norm * size ** (2 * power - 1)) / (2 * power)
            u = mpmath.findroot(residual, (0, most), solver="anderson", tol=1e-60, maxsteps=500)
            assert abs(float(x[row, 1]) + float(size * mpmath.tanh(u))) < 1e-14 * (1 + radius) and x[row, 0] == x[row, 2] == 0
            exact = float(2 * mpmath.log(size / mpmath.cosh(u)))
            assert abs(float(log_slack[row, 0]) - exact) < 1e-11 * (1 + abs(exact))


@pytest.mark.parametrize("dim", [1, 3, 1_000, 50_000])
def test_float32_points_at_the_boundary_stay_inside_however_the_squares_are_summed(dim):
    z = torch.randn(64, dim, generator=torch.Generator().manual_seed(0)) * 1e4
    x = Ball(7.0, kappa=0.05).to_primal(z)[0]
    assert (x.double().norm(dim=1) > 6.999).all()
    flipped = x.flip(1).square()
    assert (x.square().sum(1) < 49).all() and (flipped.cumsum(1)[:, -1] < 49 + (0 if dim < 10_000 else torch.inf)).all()
    assert (x.norm(dim=1) < 7).all() and ((x * x).mean(1) * dim < 49).all()
