from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from gentrain.config import ConfigError, Document, build
from gentrain.domains.base import Domain
from gentrain.domains.box import Box
from gentrain.domains.orthonormal_slabs import OrthonormalSlabs
from gentrain.metrics.watermark import eight_bits
from gentrain.noise import Noise


def rows(count, dim, seed=0):
    return torch.linalg.qr(torch.randn(dim, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q.T.contiguous()


def test_the_slabs_move_as_a_box_and_the_complement_stays():
    A = rows(3, 12)
    slabs, box = OrthonormalSlabs(A, -0.9, 0.9), Box(-0.9, 0.9)
    x = 2 * Noise(0, torch.arange(500)).normal((500, 3, 2, 2), torch.float64)
    complement = torch.eye(12, dtype=torch.float64) - A.T @ A
    inner = slabs.project(x)
    moves = {
        slabs.reflect: (x, box.reflect),
        slabs.project: (x, box.project),
        slabs.to_dual: (inner, box.to_dual),
        lambda z: slabs.to_primal(z)[0]: (x, lambda z: box.to_primal(z)[0]),
    }
    for ours, (value, of_box) in moves.items():
        moved = ours(value)
        assert torch.allclose(slabs.coordinates(moved), of_box(slabs.coordinates(value)), atol=1e-12)
        assert torch.allclose(moved.flatten(1) @ complement, value.flatten(1) @ complement, atol=1e-12)
    velocity = Noise(1, torch.arange(500)).normal((500, 3, 2, 2), torch.float64)
    turned = slabs.reflect_with_velocity(x, velocity)[1]
    assert torch.allclose(slabs.coordinates(turned), box.reflect_with_velocity(slabs.coordinates(x), slabs.coordinates(velocity))[1])
    assert torch.allclose(turned.flatten(1) @ complement, velocity.flatten(1) @ complement)
    assert torch.equal(slabs.to_primal(x)[1], box.to_primal(slabs.coordinates(x))[1])


def test_uniform_between_the_slabs_and_normal_beside_them():
    from scipy.stats import kstest

    A = rows(2, 5)
    x = OrthonormalSlabs(A, [-1.0, 0.5], 2.0).uniform(Noise(0, torch.arange(20_000)), (20_000, 5)).double()
    u = (x @ A.T - torch.tensor([-1.0, 0.5])) / torch.tensor([3.0, 1.5])
    assert max(kstest(column.numpy(), "uniform").statistic for column in u.T) < 1.63 / 20_000**0.5
    beside = x @ torch.linalg.svd(A).Vh[2:].T
    assert max(kstest(column.numpy(), "norm").statistic for column in beside.T) < 1.63 / 20_000**0.5


def test_images_in_float32_stay_inside_however_they_are_summed():
    """100 directions of 3 x 32 x 32, duals on and far beyond the bounds."""
    A = rows(100, 3072)
    slabs = OrthonormalSlabs(A, -0.9, 0.9)
    z = 8 * torch.randn(300, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for x in (slabs.to_primal(z)[0], slabs.project(z), slabs.reflect(z), slabs.uniform(Noise(0, torch.arange(300)), (300, 3, 32, 32))):
        assert x.dtype == torch.float32 and slabs.contains(x).all()
        assert ((x.double().flatten(1) @ A.T).abs() < 0.9).all() and ((x.flatten(1)[:5] @ A.float().T).abs() < 0.9).all()
    assert (slabs.coordinates(slabs.project(z)).abs().amax() > 0.899) and not slabs.contains(z).any()


def test_images_outlast_clipping_and_rounding():
    """Points from far outside of slabs to either side of white: in [-1, 1] too, and inside after both; not so without `levels`."""
    A, high = rows(64, 3072), torch.linspace(-0.5, 0.5, 64).double()
    white = A.sum(1)
    slabs = OrthonormalSlabs(A, white + high - 0.25, white + high + 0.25, levels=256)
    z = 1 + 0.3 * torch.randn(200, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * torch.linspace(0, 4, 200)[:, None, None, None]
    for x in (slabs.to_primal(z)[0], slabs.project(z), slabs.reflect(z), slabs.uniform(Noise(0, torch.arange(200)), (200, 3, 32, 32))):
        assert x.abs().max() <= 1 and slabs.survives(x).all() and slabs.contains(x).all()
        assert slabs.contains(eight_bits(x)).all()
    assert torch.equal(slabs.project(z[150:151]), slabs.project(z)[150:151])  # no matter with which others
    inside = slabs.project(z)
    assert torch.equal(slabs.interior(inside), inside)
    free = OrthonormalSlabs(A, white + high - 0.25, white + high + 0.25)
    assert not free.contains(eight_bits(free.project(z))).any() and not free.survives(free.project(z)).any()


def test_slabs_beside_the_pixels_range_hold_without_it():
    slabs = OrthonormalSlabs(rows(2, 8), 5.0, 6.0, levels=256)
    x = slabs.project(torch.zeros(3, 8))
    assert slabs.contains(x).all() and not slabs.survives(x).any()


def test_the_key_comes_from_a_file(tmp_path):
    key = tmp_path / "key.safetensors"
    save_file({"A": rows(2, 8), "low": torch.tensor([-1.0, -0.5]), "high": torch.tensor([1.0, 0.5])}, key)
    slabs = build(Domain, Document({"name": "orthonormal_slabs", "A": str(key)}, "x.yaml"))
    slabs.check_shape((2, 2, 2))
    inside = slabs.contains(rows(2, 8).float() * torch.tensor([[0.9], [0.6]]))
    assert inside.tolist() == [True, False]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"A": [[1.0, 1.0]], "low": 0, "high": 1}, "orthonormal"),
        ({"A": [[1.0, 0.0]], "low": 0}, "high"),
        ({"A": [[1.0, 0.0]], "low": 1, "high": 0}, "low must be below high"),
        ({"A": [[1.0, 0.0]], "low": [0, 0], "high": 1}, "goes with bounds"),
        ({"A": [[float("nan"), 0.0]], "low": -1, "high": 1}, "A: it holds numbers that are not finite"),
        ({"A": [[1.0, 0.0]], "low": -1, "high": float("inf")}, "high: it holds numbers that are not finite"),
        ({"A": "nowhere.safetensors"}, "A: cannot read nowhere.safetensors"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Domain, Document({"name": "orthonormal_slabs", **values}, "x.yaml"))
