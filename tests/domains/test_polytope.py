from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from gentrain.config import ConfigError, Document, build
from gentrain.domains.base import Domain
from gentrain.domains.box import Box
from gentrain.domains.polytope import Polytope
from gentrain.domains.simplex import Simplex
from gentrain.noise import Noise

CUBE = (torch.cat([torch.eye(3), -torch.eye(3)]).tolist(), [1.0, 1.0, 1.0, 0.0, 0.0, 0.0])


def polytope(values: dict) -> Domain:
    return build(Domain, Document({"name": "polytope", **values}, "x.yaml"))


def test_rays_in_a_cube_end_where_folding_does():
    cube, box, count = Polytope(*CUBE), Box(), 3_000
    noise = Noise(0, torch.arange(count))
    start = box.uniform(noise, (count, 3), torch.float64)
    x = start + 2 * noise.normal((count, 3), torch.float64)
    velocity = noise.normal((count, 3), torch.float64)
    end, turned = cube.reflect_with_velocity(x, velocity, start)
    folded, flipped = box.reflect_with_velocity(x, velocity)
    assert torch.allclose(end, folded, atol=1e-9) and torch.allclose(turned, flipped, atol=1e-9)


def test_a_ray_that_never_rests_is_projected_after_20_walls():
    wedge = Polytope([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0]], [1e-3, 1e-3, 1.0, 1.0])
    x = torch.tensor([[0.5, 1.0], [0.2, -0.00395]])
    end = wedge.reflect(x, torch.zeros(2, 2))
    assert wedge.contains(end).all() and torch.allclose(end[1], torch.tensor([0.2, 0.00005]), atol=1e-7)
    assert torch.allclose(end[0].abs(), torch.tensor([0.5, 1e-3]), atol=1e-6)  # the nearest point, not one towards the centre


def test_the_inverse_of_the_cube_is_that_of_the_box():
    z = 6 * Noise(0, torch.arange(500)).normal((500, 3), torch.float64)
    for barrier in ("regularised", "log"):
        x, log_slack = Polytope(*CUBE, barrier=barrier).to_primal(z)
        other, other_log_slack = Box(barrier=barrier).to_primal(z)
        assert torch.allclose(x, other, atol=1e-10)
        assert torch.allclose(log_slack, other_log_slack.roll(3, 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kappa", [0.05, 0.1, 0.3, 0.9])
def test_thirty_random_facets_in_ten_dimensions(kappa):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(30, 10, generator=generator, dtype=torch.float64)
    domain = Polytope(
        torch.cat([A, torch.eye(10), -torch.eye(10)]),
        torch.cat([torch.rand(30, generator=generator) + 1, torch.full((20,), 3.0)]),
        kappa=kappa,
    )
    x = domain.uniform(Noise(0, torch.arange(100)), (100, 10), torch.float64)
    assert (domain.to_primal(domain.to_dual(x))[0] - x).abs().max() < 1e-9
    z = torch.cat([scale * torch.randn(100, 10, generator=generator, dtype=torch.float64) for scale in (1, 30, 1e3)])
    x, log_slack = domain.to_primal(z)
    force = (-kappa * log_slack).exp() @ domain._constants(z)[0]
    assert ((x + force - z).norm(dim=1) / (1 + z.norm(dim=1))).max() < 1e-9


def test_a_vertex_where_more_facets_meet_than_dimensions():
    """A square pyramid: four facets at the apex, whose multipliers rounding cannot tell apart."""
    A = torch.tensor([[1.0, 0, 1], [-1, 0, 1], [0, 1, 1], [0, -1, 1], [0, 0, -1]], dtype=torch.float64)
    pyramid = Polytope(A, torch.tensor([1.0, 1, 1, 1, 0], dtype=torch.float64))
    z = torch.tensor([[0.0, 0.0, 60.0], [0.1, 0.0, 300.0], [0.0, 0.0, -300.0]], dtype=torch.float64)
    x, log_slack = pyramid.to_primal(z)
    assert torch.allclose(x[:2], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), atol=1e-9) and pyramid.contains(x).all()
    force = (-0.1 * log_slack).exp() @ A
    assert ((x + force - z).norm(dim=1) / (1 + z.norm(dim=1))).max() < 1e-9
    near = pyramid.project(torch.tensor([[0.2, 0.1, 5.0], [0.0, 0.0, -1.0]], dtype=torch.float64))
    assert torch.allclose(near, torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64), atol=1e-8)


@pytest.mark.parametrize("dim, stretch", [(2, 1.0), (5, 1.0), (5, 1e6), (20, 1.0)])
def test_hit_and_run_reaches_the_uniform_law(dim, stretch):
    """Marginals of a cube, one side stretched, that starts in a corner so that its centre is not the origin; 1.63 is the 1 % limit."""
    from scipy.stats import kstest

    side = torch.ones(dim, dtype=torch.float64)
    side[0] = stretch
    identity = torch.eye(dim, dtype=torch.float64)
    domain = Polytope(torch.cat([identity, -identity]), torch.cat([side, torch.zeros(dim, dtype=torch.float64)]))
    x = domain.uniform(Noise(0, torch.arange(2_000)), (2_000, dim)).double() / side
    assert max(kstest(column.numpy(), "uniform").statistic for column in x.T) < 1.63 / 2_000**0.5 * 1.2
    assert x.T.corrcoef().fill_diagonal_(0).abs().max() < 0.1


def test_equalities_hold_in_coordinates_of_their_null_space():
    C = torch.tensor([[1.0, 1, 1, 1, 1], [0, 1, 2, 3, 4], [1, 2, 3, 4, 5]], dtype=torch.float64)  # of rank 2
    d = torch.tensor([1.0, 1.5, 2.5], dtype=torch.float64)
    domain = Polytope(-torch.eye(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64), C, d)
    domain.check_shape((3,))
    y = domain.uniform(Noise(0, torch.arange(1_000)), (1_000, 3))
    x = domain.to_full(y)
    assert (x @ C.T - d).abs().max() < 1e-12 and (x > 0).all()
    assert torch.allclose(domain.slack(y.double()), x, atol=1e-12)
    assert torch.allclose(domain.to_coordinates(x), y.double(), atol=1e-12)
    basis = domain.to_full(torch.eye(3)) - domain.to_full(torch.zeros(1, 3))
    assert torch.allclose(basis @ basis.T, torch.eye(3, dtype=torch.float64), atol=1e-12)
    first = torch.eye(5, dtype=torch.float64)[0] - torch.linalg.pinv(C) @ C[:, 0]  # e_1 in the null space
    assert torch.allclose(basis[0], first / first.norm(), atol=1e-12)


def test_matrices_come_from_a_file(tmp_path):
    file = tmp_path / "cube.safetensors"
    save_file({"A": torch.tensor(CUBE[0]), "b": torch.tensor(CUBE[1])}, file)
    domain = polytope({"A": str(file)})
    assert torch.equal(domain.contains(torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 1.5]])), torch.tensor([True, False]))
    save_file({"b": torch.tensor(CUBE[1])}, file)
    with pytest.raises(ConfigError, match=r"x.yaml: A: .*holds no tensor called A"):
        polytope({"A": str(file)})
    with pytest.raises(ConfigError, match=r"x.yaml: A: cannot read nowhere.safetensors"):
        polytope({"A": "nowhere.safetensors"})


@pytest.mark.parametrize(
    "values, message",
    [
        ({"A": [[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], "b": [1, 1, -3]}, "no point satisfies.*; raise b"),
        ({"A": [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], "b": [1, -1, 1, 1]}, r"no interior: among rows .* equalities"),
        ({"A": [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], "b": [1, 1, 1]}, "unbounded"),
        ({"A": [[1.0, 0.0], [-1.0, 0.0]], "b": [1, 1]}, "unbounded"),
        ({"A": [[1.0, 0.0], [-1.0, 0.0]]}, "give b"),
        ({"A": [[1.0], [-1.0]], "b": [1, 1, 1]}, r"A \[m, n\] goes with b"),
        ({"A": CUBE[0], "b": CUBE[1], "C": [[1, 0, 0], [1, 0, 0]], "d": [0, 1]}, "no solution"),
        ({"A": CUBE[0], "b": CUBE[1], "C": torch.eye(3).tolist(), "d": [0.5, 0.5, 0.5]}, "single point"),
        ({"A": [[1.0, float("nan")], [-1.0, 0.0]], "b": [1, 1]}, "A: it holds numbers that are not finite"),
        ({"A": CUBE[0], "b": [float("inf"), *CUBE[1][1:]]}, "b: it holds numbers that are not finite"),
        ({"A": CUBE[0], "b": CUBE[1], "C": [[float("nan"), 1, 1]], "d": [0]}, "C: it holds numbers that are not finite"),
        ({"A": [[1.0, 0.0], [-1.0]], "b": [1, 1]}, "A: its rows differ in length"),
        ({"A": [*CUBE[0], [0.0, 0.0, 0.0]], "b": [*CUBE[1], 1.0]}, r"A: rows \[6\] are zero"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        polytope(values)


@pytest.mark.parametrize(
    "domain, held",
    [
        (Polytope(*CUBE), "a number for each column of A"),
        (Polytope(*CUBE, [[1.0, 1.0, 1.0]], [1.0]), "Polytope.to_coordinates of the 3 variables"),
        (Simplex(2), "all proportions but the last"),
    ],
)
def test_what_samples_hold_is_told(domain, held):
    with pytest.raises(ValueError, match=held):
        domain.check_shape((4,))
