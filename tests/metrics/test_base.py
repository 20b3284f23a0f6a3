import math

import pytest
import torch

from gentrain.metrics.base import bootstrap_interval


def mean_difference(a, b):
    return float(a.mean() - b.mean())


def test_the_interval_of_a_mean_is_the_textbook_one():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4000, generator=generator).double(), 2 * torch.randn(2000, generator=generator).double()
    found = bootstrap_interval(mean_difference, a, b, resamples=2000)
    error = math.sqrt(a.var() / 4000 + b.var() / 2000)
    assert found.value == pytest.approx(mean_difference(a, b), abs=0.1 * error)
    assert found.low == pytest.approx(mean_difference(a, b) - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(mean_difference(a, b) + 1.96 * error, abs=0.2 * error)
    narrow = bootstrap_interval(mean_difference, a, b, resamples=2000, level=0.5)
    assert (narrow.high - narrow.low) / (found.high - found.low) == pytest.approx(0.6745 / 1.96, abs=0.05)


def test_samples_are_drawn_independently():
    a = torch.randn(100)
    found = bootstrap_interval(mean_difference, a, a)
    assert found.high - found.low > 0.2  # rows drawn in pairs would give 0


def test_the_same_seed_gives_the_same_interval():
    a, b = torch.randn(50), torch.randn(40)
    first = bootstrap_interval(mean_difference, a, b, seed=1)
    assert first == bootstrap_interval(mean_difference, a, b, seed=1) != bootstrap_interval(mean_difference, a, b, seed=2)


def test_bias_is_removed_and_skew_kept():
    """The squared mean is too large by var / n; its resamples lean to the right, and so does the interval."""
    generator = torch.Generator().manual_seed(0)
    found = [bootstrap_interval(lambda x: float(x.mean() ** 2), torch.randn(20, generator=generator) + 0.5, seed=s) for s in range(200)]
    plug_in_bias, error = 1 / 20, 0.22 * math.sqrt(1 / 20) * 4 / math.sqrt(200)
    assert abs(sum(f.value for f in found) / 200 - 0.25) < error < plug_in_bias
    assert sum(f.high - f.value for f in found) > 1.2 * sum(f.value - f.low for f in found)
    assert sum(f.low <= 0.25 <= f.high for f in found) / 200 >= 0.85
