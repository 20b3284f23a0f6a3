"""Likelihoods of reflected diffusions against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from gentrain.domains.box import Box
from gentrain.metrics.likelihood import bits_per_dim, dequantised, flow_log_density, level_points, variational_bound
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.inside import Inside
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.reflected_heat import ReflectedHeat
from tests.samplers.reflected import atoms_denoiser


def noise_of(count: int) -> Noise:
    return Noise(4, torch.arange(count))


def uniform_denoiser(low: float, high: float) -> Denoiser:
    path = ReflectedHeat(space=Inside(domain=Box(low, high)))
    return Denoiser(lambda x, t, condition: torch.zeros_like(x), path, "eps")


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-1.0, 1.0)])
def test_the_bound_of_uniform_data_is_their_density(low: float, high: float) -> None:
    """With score 0, 1/2 int g^2 E |kernel score|^2 dt = E log k_eps + D log width (de Bruijn): decoder and diffusion cancel."""
    denoiser, count, dim = uniform_denoiser(low, high), 4000, 3
    x = denoiser.path.box.uniform(noise_of(count), (count, dim))
    bound = variational_bound(denoiser, x, noise_of(count))
    kernel = -math.log(denoiser.path.sigma_min) * dim  # the size of what cancels: 14
    assert abs(bound.mean().item() - dim * math.log(high - low)) < 0.01 * kernel


def _beta_atoms() -> tuple[torch.Tensor, torch.Tensor]:
    atoms = (torch.arange(50) + 0.5) / 50
    weights = atoms * (1 - atoms) ** 3
    return atoms, weights / weights.sum()


def test_the_bound_of_an_exact_score_is_near_the_density_and_the_flow_gives_it() -> None:
    """Data of a smooth law at the lowest noise level: the flow's density is exact, and the bound above it on average."""
    atoms, weights = _beta_atoms()
    denoiser, count = atoms_denoiser(0.03, atoms, weights), 500
    x = atoms[torch.multinomial(weights, count, replacement=True, generator=torch.Generator().manual_seed(0))][:, None]
    x = denoiser.path.perturb(x, noise_of(count).normal((count, 1)), torch.zeros(count))
    kernel = denoiser.path.box.heat_kernel_log_density(x.expand(-1, 50), atoms.expand(count, -1), 0.03)
    exact = (kernel + weights.log()).logsumexp(1).double()
    flow = flow_log_density(denoiser, x.double(), noise_of(count), steps=60)
    assert (flow - exact).abs().mean() < 0.02
    assert (flow - exact).mean().abs() < 0.005
    bound = variational_bound(denoiser, x, noise_of(count), draws=32)
    assert -0.05 < (bound + exact).mean() < 0.25  # in expectation at least 0; the data are not those at t = 0


def test_random_probes_estimate_the_divergence() -> None:
    """A field whose divergence they cannot see exactly: coordinates that depend on each other."""
    path = ReflectedHeat(space=Inside(domain=Box(-1.0, 1.0)))
    mix = torch.tensor([[0.5, 0.3], [-0.4, 0.2]], dtype=torch.float64)
    denoiser = Denoiser(lambda x, t, condition: torch.sin(x @ mix.T), path, "eps")
    x = path.box.uniform(noise_of(200), (200, 2)).double() * 0.3
    exact = flow_log_density(denoiser, x, noise_of(200), steps=10)
    estimated = flow_log_density(denoiser, x, noise_of(200), steps=10, probes=64)
    assert (estimated - exact).mean().abs() < 0.05 * exact.std() + 0.02
    assert not torch.equal(estimated, exact)


@pytest.mark.parametrize("low, high, levels", [(-1.0, 1.0, 16), (0.0, 1.0, 100)])
def test_a_model_of_uniform_density_gives_every_level_the_same_bits(low: float, high: float, levels: int) -> None:
    """Score 0: its flow has log2(levels) bits exactly, dequantised data fill the box evenly, the bound is above by what its decoder, which
    sees x_0' only, must lose: the entropy of the kernel at the lowest noise level that the sum over levels leaves open.
    """
    denoiser, count, dim = uniform_denoiser(low, high), 2000, 3
    box = denoiser.path.box
    points = level_points(box, levels, torch.zeros(1)).float()
    assert points[0] == low and points[-1] == high and len(points) == levels
    x = points[noise_of(count).randint(0, levels, (count, dim))]
    spread, more = dequantised(box, x, levels, noise_of(count))
    assert box.contains(spread).all()
    assert ((spread - low) / (high - low) * levels).floor().equal(((x - low) / (high - low) * (levels - 1)).round())
    flow = -flow_log_density(denoiser, spread, noise_of(count), steps=3) - dim * more
    torch.testing.assert_close(bits_per_dim(flow, dim), torch.full((count,), math.log2(levels)).double())

    bound = bits_per_dim(variational_bound(denoiser, x, noise_of(count), levels=levels), dim)
    sigma = denoiser.path.sigma_min
    start = box.reflect(x + sigma * noise_of(count).normal((count, dim)))
    each = torch.stack([box.heat_kernel_log_density(start, point.expand(count, dim), sigma) for point in points])
    # E log k(x_0' | x) of the diffusion term (de Bruijn), and the decoder's -log k(x | x_0') + log sum over levels
    expected = (each.logsumexp(0).mean() + math.log(high - low)) / math.log(2)
    assert abs(bound.mean() - expected) < 0.02 * abs(math.log2(sigma)) and bound.mean() > math.log2(levels) - 0.05


def test_bits_are_nats_over_log_2() -> None:
    assert bits_per_dim(torch.tensor([3 * math.log(2.0)]), 3).item() == pytest.approx(1.0)


def test_levels_of_uneven_boxes_are_refused() -> None:
    with pytest.raises(ValueError, match="the same in every coordinate"):
        level_points(Box([0.0, 0.0], [1.0, 2.0]), 4, torch.zeros(1))


def test_other_paths_have_none() -> None:
    denoiser = Denoiser(lambda x, t, condition: x, RectifiedFlow(), "velocity")
    with pytest.raises(ValueError, match="those of the path reflected_heat"):
        variational_bound(denoiser, torch.zeros(2, 1), noise_of(2))
