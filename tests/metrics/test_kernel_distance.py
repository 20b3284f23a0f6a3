import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import polynomial_kernel

from gentrain.metrics.distances import _kernel_distances, kernel_distance, kernel_metric


def samples(count, shift, seed, dim=4):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift


def test_equals_the_unbiased_estimator_with_scikit_learns_kernel():
    a, b = samples(1100, 0.0, 0), samples(60, 0.3, 1)  # more than one part of rows; the kernel's defaults are degree 3, 1 / D and 1
    k_aa, k_bb, k_ab = (
        polynomial_kernel(x.double().numpy(), y.double().numpy()) for x, y in ((a, a), (b, b), (a, b))
    )  # degree 3, 1 / D, 1
    np.fill_diagonal(k_aa, 0)
    np.fill_diagonal(k_bb, 0)
    expected = k_aa.sum() / (1100 * 1099) + k_bb.sum() / (60 * 59) - 2 * k_ab.mean()
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert kernel_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_its_mean_over_samples_of_equal_laws_is_zero_at_any_size():
    for count in (5, 40):
        values = torch.tensor([kernel_distance(samples(count, 0.0, 2 * seed), samples(count, 0.0, 2 * seed + 1)) for seed in range(300)])
        assert abs(values.mean()) < 3 * values.std() / 300**0.5 and values.min() < 0


def test_it_sees_shifts_and_third_moments():
    a = samples(400, 0.0, 0)
    skewed = torch.distributions.Exponential(1.0).sample((400, 4)) - 1
    same, moved, leaning = (kernel_distance(a, b) for b in (samples(400, 0.0, 1), samples(400, 0.5, 1), skewed))
    assert abs(same) < 0.05 * moved and leaning > 5 * abs(same)


def truth_of_a_shift(m):
    """Of N(0, 1) against N(m, 1) in one dimension: E k(x, y) with x y + 1 expanded to the third power."""
    return (1 + 3) + (1 + 3 * (1 + m**2) ** 2 + 3 * m**2 + (3 * m + m**3) ** 2) - 2 * (1 + 3 * (1 + m**2))


@pytest.mark.parametrize("m", [0.0, 0.5])
def test_the_interval_is_about_the_true_value(m):
    """100 and 90 of 100 cover, measured; a percentile interval of resamples that keep the pairs of a row with itself covers none at 0."""
    metrics = [kernel_metric("kernel distance", samples(200, 0.0, 2 * i, 1), samples(200, m, 2 * i + 1, 1), "of points") for i in range(30)]
    assert sum(metric.low <= truth_of_a_shift(m) <= metric.high for metric in metrics) >= 24
    assert all(metric.better == "lower" and 0 <= metric.low <= metric.value <= metric.high for metric in metrics)


def test_resamples_are_what_drawing_their_rows_gives():
    a, b = samples(1100, 0.0, 0), samples(50, 0.3, 1)
    rows_a, rows_b = (torch.randint(len(x), (len(x),), generator=torch.Generator().manual_seed(2)) for x in (a, b))
    times = [torch.bincount(rows, minlength=len(x)).double()[None] for rows, x in ((rows_a, a), (rows_b, b))]

    def apart(rows_x, x):
        kernel = polynomial_kernel(x[rows_x].double().numpy())
        return kernel[rows_x[:, None].numpy() != rows_x[None].numpy()].mean()

    expected = apart(rows_a, a) + apart(rows_b, b) - 2 * polynomial_kernel(a[rows_a].double().numpy(), b[rows_b].double().numpy()).mean()
    assert float(_kernel_distances(a, b, *times)) == pytest.approx(expected, rel=1e-9)


def test_samples_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="some reference samples are NaN or inf"):
        kernel_metric("kernel distance", torch.zeros(4, 2), torch.full((4, 2), torch.nan), "of points")
