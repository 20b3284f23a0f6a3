"""What every domain promises, on every barrier."""

from __future__ import annotations

import pytest
import torch

from gentrain.domains.ball import Ball
from gentrain.domains.box import Box
from gentrain.domains.linear import Linear
from gentrain.domains.orthonormal_slabs import OrthonormalSlabs
from gentrain.domains.polytope import Polytope
from gentrain.domains.simplex import Simplex
from gentrain.noise import Noise

ROWS = torch.linalg.qr(torch.randn(9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q.T
PENTAGON = ([[1, 1], [-1, -1], [1, -1], [-5, 1], [-1 / 3, 1]], [10, 30, 1, 90, 5])  # of arXiv:2510.08929, figure 2
CUT_CUBE = (torch.cat([torch.eye(3), -torch.eye(3), torch.ones(1, 3)]).tolist(), [1.0] * 6 + [1.5])

DOMAINS = {
    "box": (Box(), (4,)),
    "box of images": (Box(-1, 1, kappa=0.3), (1, 2, 2)),
    "box, log": (Box(-1, [1, 2, 3], barrier="log"), (3,)),
    "box, atanh": (Box(barrier="atanh"), (4,)),
    "ball": (Ball(2.0), (6,)),
    "ball, log": (Ball(1.0, barrier="log"), (3,)),
    "ball, small kappa": (Ball(12.0, kappa=0.05), (1, 2, 2)),
    "simplex": (Simplex(5), (5,)),
    "simplex, log": (Simplex(3, barrier="log"), (3,)),
    "simplex, entropic": (Simplex(5, barrier="entropic"), (5,)),
    "polytope": (Polytope(*PENTAGON, kappa=0.3), (2,)),
    "polytope, log": (Polytope(*CUT_CUBE, barrier="log"), (3,)),
    "polytope, equality": (Polytope(*CUT_CUBE, [[1.0, 2.0, -1.0]], [0.25]), (2,)),
    "slabs": (OrthonormalSlabs(ROWS, -0.9, 0.9), (1, 3, 3)),
    "slabs, atanh": (OrthonormalSlabs(ROWS, [-1.0, -0.5, 0.0], 1.05, barrier="atanh"), (9,)),
}


@pytest.fixture(params=DOMAINS)
def case(request):
    return DOMAINS[request.param]


def points(domain, shape, count, dtype=torch.float64, seed=0):
    return domain.uniform(Noise(seed, torch.arange(count)), (count, *shape), dtype)


def spread(shape, count, scale, dtype=torch.float64, seed=0):
    """Multivariate Student t with one degree of freedom: most rows near, some very far."""
    noise = Noise(seed, torch.arange(count))
    normal = noise.normal((count, *shape), torch.float64)
    return (scale * normal / noise.normal((count, *[1] * len(shape)), torch.float64).abs()).to(dtype)


def outside_slack(domain, x):
    """Slacks of the exact values of x, whatever their dtype."""
    return domain.slack(x.double())


def test_the_shape_is_checked(case):
    domain, shape = case
    domain.check_shape(shape)
    if not isinstance(domain, Ball) and domain not in (DOMAINS["box"][0], DOMAINS["box of images"][0], DOMAINS["box, atanh"][0]):
        with pytest.raises(ValueError, match=r"got samples of shape \(7, 1\)"):
            domain.check_shape((7, 1))


def test_round_trips_are_exact_to_1e_9(case):
    domain, shape = case
    x = torch.cat([points(domain, shape, 500), domain.interior(spread(shape, 500, 2.0), 1e-6)])
    back, log_slack = domain.to_primal(domain.to_dual(x))
    assert (back - x).abs().max() < 1e-9
    assert torch.allclose(log_slack, domain.slack(x).log(), atol=1e-6)
    assert torch.equal(domain.contains(x), torch.ones(1000, dtype=torch.bool))
    z = spread(shape, 500, 0.5, seed=1)
    z = z / (1 + z.flatten(1).norm(dim=1) / 6).reshape(-1, *[1] * len(shape))  # beyond, slacks are too small to come back from x
    x, log_slack = domain.to_primal(z)
    near = log_slack.amin(1) > -20
    assert near.sum() > 100
    assert ((domain.to_dual(x[near]) - z[near]).flatten(1).norm(dim=1) / (1 + z[near].flatten(1).norm(dim=1))).max() < 1e-6


def test_the_inverse_is_1_lipschitz(case):
    """Equivalently the mirror map never brings points closer: 1e5 pairs, some almost on the boundary."""
    domain, shape = case
    if domain is DOMAINS["slabs, atanh"][0]:
        pytest.skip("its slabs are wider than 2")
    far = [domain.interior(spread(shape, 25_000, scale, seed=seed), 1e-9) for seed, scale in ((1, 1.0), (2, 3.0))]
    x = torch.cat([points(domain, shape, 2_000).repeat(25, *[1] * len(shape)), *far])
    y = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    primal = (x - y).flatten(1).norm(dim=1)
    dual = (domain.to_dual(x) - domain.to_dual(y)).flatten(1).norm(dim=1)
    assert len(x) == 100_000 and (primal <= dual * (1 + 1e-12)).all()


def test_jacobians_are_the_hessian_and_its_inverse(case):
    domain, shape = case
    x = points(domain, shape, 6, seed=3)
    dim = x[0].numel()
    hessian = domain.hessian(x)
    z = domain.to_dual(x)
    for row in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(domain.to_dual, x[row : row + 1]).reshape(dim, dim)
        assert torch.allclose(jacobian, hessian[row], rtol=1e-9, atol=1e-9)
    step = 1e-5
    for column, direction in enumerate(torch.eye(dim, dtype=x.dtype).reshape(dim, *shape)):
        difference = (domain.to_primal(z + step * direction)[0] - domain.to_primal(z - step * direction)[0]).flatten(1) / (2 * step)
        assert torch.allclose(difference, torch.linalg.inv(hessian)[:, :, column], atol=1e-6)


def test_log_slack_solves_the_dual_equation_far_beyond_rounding(case):
    """z and log slack satisfy z = x + A^T m to 1e-9 where the slack itself is far too small to be seen in x."""
    domain, shape = case
    if isinstance(domain, Ball) or domain.barrier in ("entropic", "atanh") or isinstance(domain, OrthonormalSlabs):
        pytest.skip("tested against closed forms in its own file")
    z = spread(shape, 2_000, 30.0)
    x, log_slack = domain.to_primal(z)
    assert log_slack.min() < (-15 if domain.barrier == "log" else -40)
    exponent = 1.0 if domain.barrier == "log" else domain.kappa
    weights = (-exponent * log_slack).exp()
    if isinstance(domain, Box):
        below, above = weights.chunk(2, 1)
        force = (above - below).reshape(z.shape)
    else:
        force = weights @ domain._constants(z)[0]
    residual = (x + force - z).flatten(1).norm(dim=1) / (1 + z.flatten(1).norm(dim=1))
    assert residual.max() < 1e-9
    scale = domain.slack(x).max()
    assert ((log_slack.exp() - domain.slack(x)).abs() <= 1e-10 * scale * (1 + z.flatten(1).norm(dim=1, keepdim=True))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_returned_touches_the_boundary(case, dtype):
    """Duals of any size, 99,000 or 9,900: strictly inside by contains and by the exact values."""
    domain, shape = case
    count = 3_300 if isinstance(domain, Linear) else 33_000
    z = torch.cat([spread(shape, count, scale, dtype, seed) for seed, scale in enumerate((1.0, 100.0, 1e5))])
    far = spread(shape, 5_000, 10.0, dtype)
    if isinstance(domain, OrthonormalSlabs):  # the complement is not bounded, and beyond 1e5 float32 cannot tell the slabs' sides apart
        z, far = (x * (1e4 / x.flatten(1).norm(dim=1).clamp(min=1e4)).reshape(-1, *[1] * len(shape)) for x in (z, far))
    x, log_slack = domain.to_primal(z)
    assert x.dtype == log_slack.dtype == dtype and len(x) == 3 * count
    assert log_slack.isfinite().all()
    returned = [x, domain.reflect(far), domain.project(z[::10]), points(domain, shape, 2_000, dtype)]
    for value in returned:
        assert value.dtype == dtype and value.shape[1:] == shape
        assert domain.contains(value).all() and (outside_slack(domain, value) > 0).all()


def test_float32_is_float64_rounded(case):
    domain, shape = case
    x = points(domain, shape, 300, torch.float32)
    assert torch.allclose(domain.to_dual(x), domain.to_dual(x.double()).float(), rtol=1e-6)
    z = domain.to_dual(x)
    assert torch.allclose(domain.to_primal(z)[0], domain.to_primal(z.double())[0].float(), rtol=1e-5, atol=1e-6)


def test_interior_keeps_what_is_inside_and_moves_the_rest_inside_with_the_margin(case):
    domain, shape = case
    x = points(domain, shape, 500)
    deep = x[domain.slack(x).amin(1) > 1e-6]
    assert torch.equal(domain.interior(deep), deep) and torch.equal(domain.interior(deep, 1e-7), deep)
    moved = domain.interior(spread(shape, 500, 5.0), 1e-3)
    assert domain.slack(moved).min() >= 1e-3 * (1 - 1e-9)
    on = domain.interior(x + 1e-3, 1e-3)
    assert (on - x).abs().max() < 0.5
    with pytest.raises(ValueError, match=r"slack of|away from"):
        domain.interior(x, 1e6)
    broken = x.clone()
    broken[3] = torch.nan
    assert domain.contains(domain.interior(broken)).logical_not().nonzero().flatten().tolist() == [3]


def test_the_projection_is_the_nearest_point(case):
    """Against the variational inequality (z - p) . (y - p) <= 0 for all y inside."""
    domain, shape = case
    z = torch.cat([spread(shape, 200, 4.0), points(domain, shape, 50)])
    p = domain.project(z).flatten(1)
    inside = points(domain, shape, 300).flatten(1)
    products = torch.einsum("nd,nmd->nm", z.flatten(1) - p, inside[None] - p[:, None])
    size = 1 + z.flatten(1).norm(dim=1, keepdim=True)
    assert (products / size).max() < 1e-7
    kept = domain.contains(z)
    assert kept.sum() >= 50 and torch.allclose(p[kept], z.flatten(1)[kept], atol=1e-12)


def test_reflection_keeps_speed_and_ends_where_it_started_without_a_wall(case):
    domain, shape = case
    start = points(domain, shape, 400)
    short = start + 1e-9 * torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=start.dtype)
    deep = domain.slack(start).amin(1) > 1e-6
    assert torch.equal(domain.reflect(short, start)[deep], short[deep])
    x = start + spread(shape, 400, 1.0)
    end, turned = domain.reflect_with_velocity(x, x - start, start)
    assert torch.allclose(turned.flatten(1).norm(dim=1), (x - start).flatten(1).norm(dim=1), rtol=1e-9)
    assert torch.equal(end, domain.reflect(x, start)) and domain.contains(end).all()


def test_points_on_the_boundary_are_refused_by_name(case):
    domain, shape = case
    x = points(domain, shape, 5)
    x[2] = 1e3
    with pytest.raises(ValueError, match=r"1 points are not strictly inside, the worst in row 2.*interior"):
        domain.to_dual(x)


def test_a_dual_that_is_not_a_number_is_named(case):
    domain, shape = case
    if domain.barrier in ("entropic", "atanh"):
        pytest.skip("closed form: NaN stays NaN")
    z = torch.zeros(4, *shape, dtype=torch.float64)
    z[1] = torch.nan
    with pytest.raises(FloatingPointError, match="row 1"):
        domain.to_primal(z)
