"""Likelihoods on paths without walls against closed forms: where the model knows the score, bound and flow are the law's own.

Mutations that these tests were seen to catch: the divergence's sign, twice the diffusion term, no prior, the decoder's constant, x_t in
place of y, Euler's steps.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gentrain.metrics.free_likelihood import IMAGES, RATIOS, flow_log_density, ratios, variational_bound
from gentrain.metrics.likelihood import bits_per_dim, dequantised
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path, expand
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.reflected_heat import ReflectedHeat
from gentrain.paths.trigflow import TrigFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.paths.variance_preserving import VariancePreserving

PATHS: list[Path] = [VarianceExploding(), VariancePreserving(), RectifiedFlow(), TrigFlow()]
MEAN, DEVIATION = torch.tensor([0.7, -0.3], dtype=torch.float64), torch.tensor([0.5, 0.2], dtype=torch.float64)


def noise_of(count: int) -> Noise:
    return Noise(4, torch.arange(count))


def knowing(path: Path, posterior_mean: object) -> Denoiser:
    """A model that predicts E[x0 | y], y = x_t / alpha, at the ratio u of its time."""

    class Known(Denoiser):
        def eps(self, x_t: Tensor, t: Tensor, condition: object = None) -> Tensor:
            u = path.sigma(t) / path.alpha(t)
            y = x_t / expand(path.alpha(t), x_t)
            return (y - posterior_mean(y, expand(u, y))) / expand(u, y)  # type: ignore[operator]

    return Known(lambda *_: torch.tensor(0.0), path, "eps")


def normal_denoiser(path: Path) -> Denoiser:
    return knowing(path, lambda y, u: (MEAN * u**2 + y * DEVIATION**2) / (DEVIATION**2 + u**2))


@pytest.mark.parametrize("path", PATHS)
def test_bound_and_flow_of_a_normal_law_are_its_density(path: Path) -> None:
    denoiser, least = normal_denoiser(path), ratios(path)[0]

    def law(count: int) -> tuple[Tensor, Tensor]:
        x = MEAN + DEVIATION * noise_of(count).normal((count, 2), torch.float64)
        wide = (DEVIATION**2 + least**2).sqrt()  # of y at the least ratio, which the flow's density is of
        return x, torch.distributions.Normal(MEAN, wide).log_prob(x).sum(1)

    x, exact = law(400)
    flow = flow_log_density(denoiser, x, noise_of(400), steps=200)
    assert (flow - exact).abs().max() < 0.04  # the prior's mean is 0, not that of the data: |mean| / 80 times the place in it
    assert (flow - exact).mean().abs() < 0.005
    x, exact = law(4000)
    bounds = [variational_bound(denoiser, x, noise_of(4000), draws=draws).add(exact).mean() for draws in (64, 1)]
    assert abs(bounds[0]) < 0.1 and abs(bounds[1]) < 1  # 3.5 standard errors: each item meets that many levels of noise


@pytest.mark.parametrize("path", PATHS)
def test_the_bound_of_two_levels_is_their_entropy(path: Path) -> None:
    """Coordinates -1 and 1, the latter with probability 0.8: the least noisy y leaves no doubt, so that the bound is -log p(x) itself."""
    share, count, dim = 0.8, 3000, 3
    x = 2.0 * noise_of(count).bernoulli(share, (count, dim)).double() - 1
    denoiser = knowing(path, lambda y, u: torch.tanh(y / u**2 + math.log(share / (1 - share)) / 2))
    bits = bits_per_dim(variational_bound(denoiser, x, noise_of(count), draws=32, levels=2), dim)
    exact = -((x > 0) * math.log2(share) + (x < 0) * math.log2(1 - share)).mean(1)
    assert abs((bits - exact).mean()) < 0.02 * exact.mean()


def test_where_noise_ends_early_the_prior_is_not_what_the_data_became() -> None:
    """Bound and flow then lie above by how far apart the two are: of the bound exactly their KL divergence, on average."""
    count, most = 6000, 2.0
    x = MEAN + DEVIATION * noise_of(count).normal((count, 2), torch.float64)
    denoiser = normal_denoiser(VarianceExploding(sigma_max=most))
    entropy = (0.5 + (DEVIATION * math.sqrt(2 * math.pi)).log()).sum()
    variance = (DEVIATION**2 + most**2) / most**2
    divergence = (variance - 1 - variance.log() + (MEAN / most) ** 2).sum() / 2
    assert divergence > 0.07
    bound = variational_bound(denoiser, x, noise_of(count), draws=64).mean()
    assert abs(bound - entropy - divergence) < 0.04
    x = x[:600]
    ends = MEAN + (x - MEAN) * ((DEVIATION**2 + most**2) / (DEVIATION**2 + 0.002**2)).sqrt()  # where the flow of a normal law goes
    stretched = torch.log((DEVIATION**2 + most**2) / (DEVIATION**2 + 0.002**2)).sum() / 2
    exact = torch.distributions.Normal(0.0, most).log_prob(ends).sum(1) + stretched
    assert (flow_log_density(denoiser, x, noise_of(600), steps=200) - exact).abs().max() < 0.002  # 0.0052 with 100 steps


def test_a_model_that_knows_less_has_a_larger_bound() -> None:
    count = 2000
    x = MEAN + DEVIATION * noise_of(count).normal((count, 2), torch.float64)
    wrong = knowing(VarianceExploding(), lambda y, u: (0 * u**2 + y * DEVIATION**2) / (DEVIATION**2 + u**2))  # of mean 0
    excess = (variational_bound(wrong, x, noise_of(count)) - variational_bound(normal_denoiser(PATHS[0]), x, noise_of(count))).mean()
    divergence = (MEAN**2 / (2 * DEVIATION**2)).sum()
    assert abs(excess - divergence) < 0.1 * divergence  # of laws that differ by their means


def test_random_probes_estimate_the_divergence() -> None:
    mix = torch.tensor([[0.5, 0.3], [-0.4, 0.2]], dtype=torch.float64)
    denoiser = knowing(VarianceExploding(), lambda y, u: torch.sin(y @ mix.T) / (1 + u))
    x = noise_of(200).normal((200, 2), torch.float64)
    exact = flow_log_density(denoiser, x, noise_of(200), steps=20)
    estimated = flow_log_density(denoiser, x, noise_of(200), steps=20, probes=64)
    assert (estimated - exact).mean().abs() < 0.05 * exact.std() + 0.02
    assert not torch.equal(estimated, exact)


def test_bits_of_levels_by_the_flow() -> None:
    """Dequantised uniform levels fill the box; a flow of the normal law gives them its density, whose mean over the box is known."""
    count, levels = 3000, 16
    points = torch.linspace(-1, 1, levels, dtype=torch.float64)
    x = points[noise_of(count).randint(0, levels, (count, 2))]
    spread, more = dequantised(IMAGES, x, levels, noise_of(count))
    found = -flow_log_density(normal_denoiser(PATHS[0]), spread, noise_of(count), steps=60) - 2 * more
    second = 1 / 3 + MEAN**2  # E (x - mean)^2 of the uniform law
    expected = (second / (2 * DEVIATION**2) + (DEVIATION * math.sqrt(2 * math.pi)).log()).sum() + 2 * math.log(levels / 2)
    assert abs(found.mean() - expected) < 0.02 * expected


def test_paths_are_looked_at_between_the_ratios() -> None:
    assert ratios(VarianceExploding()) == pytest.approx(RATIOS)
    assert ratios(VarianceExploding(sigma_min=0.01, sigma_max=5.0)) == pytest.approx((0.01, 5.0))
    assert ratios(RectifiedFlow()) == pytest.approx(RATIOS)
    least, most = ratios(VariancePreserving())
    assert least == pytest.approx(0.01, rel=0.01) and most == pytest.approx(80.0)
    with pytest.raises(ValueError, match="has walls"):
        ratios(ReflectedHeat(space={"name": "inside"}))  # type: ignore[arg-type]
