from __future__ import annotations

import pytest
import torch

from gentrain.domains.polytope import Polytope
from gentrain.domains.simplex import Simplex
from gentrain.noise import Noise


def as_polytope(dim, **fields):
    A = torch.cat([-torch.eye(dim, dtype=torch.float64), torch.ones(1, dim, dtype=torch.float64)])
    return Polytope(A, torch.tensor([0.0] * dim + [1.0], dtype=torch.float64), **fields)


def duals(count, dim, scale=4.0):
    return scale * Noise(0, torch.arange(count)).normal((count, dim), torch.float64)


@pytest.mark.parametrize("barrier", ["regularised", "log"])
def test_the_bordered_system_is_solved_as_the_general_one(barrier):
    z = duals(300, 4)
    x, log_slack = Simplex(4, barrier=barrier).to_primal(z)
    other, other_log_slack = as_polytope(4, barrier=barrier).to_primal(z)
    assert torch.allclose(x, other, atol=1e-12) and torch.allclose(log_slack, other_log_slack, atol=1e-9)


def test_many_proportions_cost_no_matrix():
    """999 free coordinates; a matrix per row would take 8 MB each."""
    simplex = Simplex(999)
    x = simplex.uniform(Noise(0, torch.arange(50)), (50, 999), torch.float64)
    assert (simplex.to_primal(simplex.to_dual(x))[0] - x).abs().max() < 1e-12


def test_entropic_is_softmax_with_a_zero_appended():
    z = torch.tensor([[1.0, -2.0], [800.0, 0.0], [-800.0, -900.0]], dtype=torch.float64)
    simplex = Simplex(2, barrier="entropic")
    x, log_parts = simplex.to_primal(z)
    assert torch.allclose(x[0], torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64).softmax(0)[:2])
    expected = torch.tensor([[0.0, -800.0, -800.0], [-800.0, -900.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(log_parts[1:], expected) and simplex.contains(x).all()


def test_the_projection_meets_that_of_the_polytope():
    z = duals(500, 5, 2.0)
    assert torch.allclose(Simplex(5).project(z), as_polytope(5).project(z), atol=1e-8)


def test_uniform_parts_follow_their_beta_law():
    from scipy.stats import beta, kstest

    x = Simplex(5).uniform(Noise(0, torch.arange(20_000)), (20_000, 5))
    for part in Simplex(5).parts(x).T:
        assert kstest(part.numpy(), beta(1, 5).cdf).statistic < 1.63 / 20_000**0.5


def test_stick_breaking_goes_there_and_back():
    simplex, noise = Simplex(5), Noise(0, torch.arange(2_000))
    u = noise.uniform((2_000, 5)).double().clamp(1e-6, 1 - 1e-6)
    x, log_jacobian = simplex.from_cube(u)
    assert torch.allclose(simplex.to_cube(x), u, atol=1e-9)
    for row in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda v: simplex.from_cube(v)[0], u[row : row + 1]).reshape(5, 5)
        assert abs(float(torch.linalg.slogdet(jacobian).logabsdet - log_jacobian[row])) < 1e-9
    assert torch.allclose(simplex.parts(x).sum(1), torch.ones(2_000, dtype=torch.float64))


def test_stick_breaking_turns_beta_numbers_into_uniform_points():
    """u_k ~ Beta(1, dim - k + 1) by the inverse of its distribution function, 1 - (1 - v)^(1 / (dim - k + 1))."""
    from scipy.stats import beta, kstest

    v = Noise(1, torch.arange(20_000)).uniform((20_000, 3)).double()
    x, _ = Simplex(3).from_cube(1 - (1 - v) ** (1 / torch.tensor([3.0, 2.0, 1.0])))
    for part in Simplex(3).parts(x).T:
        assert kstest(part.numpy(), beta(1, 3).cdf).statistic < 1.63 / 20_000**0.5


def test_float32_corners_of_the_cube_and_of_the_simplex_stay_inside():
    tiny, near_one = torch.finfo(torch.float32).tiny, 1 - 2**-24
    u = torch.cartesian_prod(*[torch.tensor([tiny, 0.5, near_one])] * 4)
    simplex = Simplex(4)
    x, log_jacobian = simplex.from_cube(u)
    assert simplex.contains(x).all() and (x > 0).all() and (x.double().sum(1) < 1).all() and log_jacobian.isfinite().all()
    back = simplex.to_cube(x)
    assert (back > 0).all() and (back < 1).all()
    corners = simplex.interior(torch.cat([torch.zeros(1, 4), torch.eye(4)]))
    assert simplex.contains(corners).all()
