import math
from functools import partial

import pytest
import torch
from scipy import linalg, stats

from gentrain.metrics.base import bootstrap_interval
from gentrain.metrics.distances import distance_metric, energy_distance, frechet_distance, sliced_wasserstein


def with_moments(count, mean, covariance, seed=0):
    """A sample whose mean and unbiased covariance are exactly these."""
    x = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def a_covariance(seed, dim=5):
    root = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(dim)


# --- closed forms -----------------------------------------------------------------------------------------------------------------


def test_frechet_distance_of_normal_laws():
    mean_a, mean_b, cov_a, cov_b = torch.zeros(5).double(), torch.arange(5).double(), a_covariance(1), a_covariance(2)
    root = linalg.sqrtm((cov_a @ cov_b).numpy()).real
    expected = 30 + float(cov_a.trace() + cov_b.trace()) - 2 * root.trace()
    a, b = with_moments(40, mean_a, cov_a), with_moments(60, mean_b, cov_b, seed=1)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_takes_dead_features():
    a, b = (with_moments(40, torch.zeros(5).double(), a_covariance(seed), seed) for seed in (1, 2))
    wide_a, wide_b = (torch.cat([x, torch.zeros(len(x), 3), x[:, :1]], 1) for x in (a, b))  # three dead ones and a copy
    root = linalg.sqrtm((torch.cov(wide_a.T) @ torch.cov(wide_b.T) + 1e-13 * torch.eye(9)).numpy()).real
    expected = float(wide_a.var(0).sum() + wide_b.var(0).sum()) - 2 * root.trace()
    assert frechet_distance(wide_a, wide_b) == pytest.approx(expected, abs=1e-4)
    assert frechet_distance(wide_a.float(), wide_b.float()) == pytest.approx(frechet_distance(wide_a, wide_b), rel=1e-5)


def test_frechet_distance_of_too_few_samples_is_refused():
    with pytest.raises(ValueError, match="5 samples cannot give a covariance of 5 features; use more samples"):
        frechet_distance(torch.randn(5, 5), torch.randn(50, 5))


def test_sliced_wasserstein_of_shift_and_scale():
    """A shift by m moves every projection by m . direction: mean of squares |m|^2 / dim. A scaling by s: (s - 1)^2 E[x^2]."""
    white = with_moments(50, torch.zeros(3).double(), torch.eye(3).double())
    shift = torch.tensor([1.0, 2, 3]).double()
    assert sliced_wasserstein(white, white + shift, projections=2000) == pytest.approx(14 / 3, rel=0.07)  # 3 standard errors
    assert sliced_wasserstein(white, 1.5 * white) == pytest.approx(0.25 * 49 / 50, rel=1e-9)
    assert sliced_wasserstein(white, white.flip(0)) == pytest.approx(0, abs=1e-12)


def test_sliced_wasserstein_in_one_dimension_takes_unequal_sizes():
    a, b = torch.randn(30, 1), torch.randn(60, 1) + 1
    expected = (a.sort(0)[0].repeat_interleave(2, 0) - b.sort(0)[0]).double().square().mean().item()
    assert sliced_wasserstein(a, b, projections=3) == pytest.approx(expected, rel=1e-6)


def test_energy_distance_against_scipy_and_its_closed_form():
    a, b = torch.randn(2100, 1).double(), 1.5 * torch.randn(1500, 1).double() + 0.5  # more than one part of rows
    ours = energy_distance(a, b)
    assert ours == pytest.approx(stats.energy_distance(a[:, 0].numpy(), b[:, 0].numpy()) ** 2, rel=1e-6)
    assert energy_distance(b, a) == pytest.approx(ours, rel=1e-9)
    assert energy_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-9)
    points = torch.tensor([[0.0, 0], [3, 4]])
    assert energy_distance(points[:1], points[1:]) == pytest.approx(10)
    assert energy_distance(points, points[1:]) == pytest.approx(2 * 2.5 - 2.5)


# --- intervals --------------------------------------------------------------------------------------------------------------------


def absolute_normal(mean, std):
    """E|x| of x ~ N(mean, std^2)."""
    return std * math.sqrt(2 / math.pi) * math.exp(-((mean / std) ** 2) / 2) + mean * math.erf(mean / std / math.sqrt(2))


def true_energy(shift, scale):
    return 2 * absolute_normal(shift, math.hypot(1, scale)) - absolute_normal(0, math.sqrt(2)) - absolute_normal(0, scale * math.sqrt(2))


POPULATIONS = [  # distance, dimension, samples, true value for N(0, 1) against N(shift, scale^2) per coordinate
    (frechet_distance, 4, 100, lambda shift, scale: 4 * (shift**2 + (scale - 1) ** 2)),
    (partial(sliced_wasserstein, projections=1), 1, 100, lambda shift, scale: shift**2 + (scale - 1) ** 2),
    (energy_distance, 1, 100, true_energy),
]


@pytest.mark.parametrize("shift, scale", [(0, 1), (0.5, 1.5)], ids=["equal", "different"])
@pytest.mark.parametrize("distance, dim, count, truth", POPULATIONS, ids=["frechet", "sliced", "energy"])
def test_intervals_cover_and_bias_is_removed(distance, dim, count, truth, shift, scale):
    generator = torch.Generator().manual_seed(0)
    covered, values, plain = 0, [], []
    for seed in range(50):
        a = torch.randn(count, dim, generator=generator)
        b = scale * torch.randn(count, dim, generator=generator) + shift
        value, low, high = bootstrap_interval(distance, a, b, seed=seed, resamples=50)
        covered += low <= truth(shift, scale) <= high
        values.append(value)
        plain.append(distance(a, b))
    values, plain = torch.tensor(values), torch.tensor(plain)
    error = values.std() / math.sqrt(50)
    assert covered >= 40  # of 50; 42 to 50 over 30 repetitions
    assert abs(values.mean() - truth(shift, scale)) < 3.5 * error
    if shift == 0:
        assert plain.mean() > 5 * error  # what is removed is there


def test_a_metric_is_cut_at_zero_and_says_what_it_is():
    a, b = (torch.randn(60, 2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    metric = distance_metric("energy distance", energy_distance, a, b, "of points")
    value, low, high = bootstrap_interval(energy_distance, a, b)
    assert low < 0 and metric.low == 0 and metric.high == high and metric.value == max(0, value)
    assert metric.name == "energy distance" and metric.better == "lower"
    assert metric.definition.startswith("of points; 60 against 60 samples")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_metric_of_broken_samples_is_refused(bad):
    broken = torch.randn(60, 2)
    broken[3, 1] = bad
    with pytest.raises(ValueError, match="some generated samples are NaN or inf"):
        distance_metric("energy distance", energy_distance, broken, torch.randn(60, 2), "of points")
