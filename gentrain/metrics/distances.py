"""Distances between two samples of vectors, computed in float64 on the CPU.

All are squared distances: smooth near 0, where a root is not and its bootstrap interval would miss. What they estimate is 0 for equal
distributions only (Frechet: for equal means and covariances).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gentrain.metrics.base import Metric, bootstrap_interval


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Wasserstein-2 distance between the normal laws with the samples' means and (unbiased) covariances.

    |mean a - mean b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson and Landau 1982; FID when the features are Inception's). No
    shrinkage: it would bias the distance by an amount that depends on the spectrum. The trace of the root is the nuclear norm of
    R_a R_b^T with C = R^T R, which needs no inverse and no root of a nearly singular product. Finite samples make the distance too
    large, so compare at equal sizes or use `distance_metric`, which corrects most of that.

    Args:
        a, b: features [N, D], [M, D]. Raises ValueError unless N, M > D: the covariance would be singular whatever the data.
    """
    if min(len(a), len(b)) <= a.shape[1]:
        raise ValueError(
            f"{min(len(a), len(b))} samples cannot give a covariance of {a.shape[1]} features; use more samples (5 times as many)"
        )
    a, b = a.double(), b.double()
    root_a, root_b = (torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (a, b))
    traces = root_a.square().sum() + root_b.square().sum() - 2 * torch.linalg.svdvals(root_a @ root_b.T).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + traces)


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 64, seed: int = 0) -> float:
    """Mean over random directions of the squared Wasserstein-2 distance of the projections (Bonneel et al. 2015), not its root.

    Args:
        a, b: [N, D], [M, D].
        projections: directions, the same for the same seed. Their choice moves a pure shift of many dimensions by sqrt(2 / projections),
            relative, which no bootstrap over the samples sees.
    """
    import ot

    return float(ot.sliced_wasserstein_distance(a.double().numpy(), b.double().numpy(), n_projections=projections, seed=seed)) ** 2


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| (Szekely and Rizzo 2013), not its root; means over all pairs, so never negative.

    Args:
        a, b: [N, D], [M, D].
    """
    return 2 * _mean_distance(a, b) - _mean_distance(a, a) - _mean_distance(b, b)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel (x . y / D + 1)^3, unbiased, so that it may be negative (arXiv:1801.01401, eq. 4).

    KID when the features are Inception's. Its expectation does not depend on the number of samples, unlike `frechet_distance`'s, nor does
    it need more samples than features.

    Args:
        a, b: features [N, D], [M, D]; N, M > 1.
    """
    return float(_kernel_distances(a, b, torch.ones(1, len(a), dtype=torch.float64), torch.ones(1, len(b), dtype=torch.float64)))


def _kernel_distances(a: Tensor, b: Tensor, times_a: Tensor, times_b: Tensor) -> Tensor:
    """The distance of R resamples at once, each row so many times: times_a [R, N], times_b [R, M] -> [R].

    Without the pairs of a row with itself: those that a resample makes by drawing it twice would raise every distance by the same as the
    diagonal does that the estimator leaves out.
    """
    within = [
        (_kernel_sums(x, x, times, times) - times.square() @ (x.double().square().sum(1) / x.shape[1] + 1).pow(3))
        / (times.sum(1).square() - times.square().sum(1))
        for x, times in ((a, times_a), (b, times_b))
    ]
    between = _kernel_sums(a, b, times_a, times_b) / (times_a.sum(1) * times_b.sum(1))
    return within[0] + within[1] - 2 * between


def _kernel_sums(a: Tensor, b: Tensor, times_a: Tensor, times_b: Tensor) -> Tensor:
    """Sum over all pairs of their kernel, each as often as its rows are drawn: [R]."""
    sums = torch.zeros(len(times_a), dtype=torch.float64)
    # in parts, since all pairs of 50,000 samples would take 20 GB
    for part, times in zip(a.double().split(1024), times_a.split(1024, dim=1), strict=True):
        kernel = (part @ b.double().T / a.shape[1] + 1).pow_(3)
        sums += (times * (times_b @ kernel.T)).sum(1)
    return sums


def kernel_metric(name: str, generated: Tensor, reference: Tensor, definition: str, seed: int = 0, resamples: int = 100) -> Metric:
    """The kernel distance with its 95 % bootstrap interval, about an estimate that has no bias to correct; cut at 0.

    All resamples share one matrix of kernels, so they cost about as much together as three distances do for features of 100 numbers.

    Raises ValueError if a sample holds NaN or inf.
    """
    _refuse_not_finite(name, generated, reference)
    generator = torch.Generator().manual_seed(seed)
    times = [_draws(len(x), resamples, generator) for x in (generated, reference)]
    draws = _kernel_distances(generated, reference, *times)
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    value, low, high = (max(0.0, bound) for bound in (kernel_distance(generated, reference), low, high))
    sizes = f"{len(generated)} against {len(reference)} samples, unbiased, bootstrap interval"
    return Metric(name, value, low, high, "lower", f"{definition}; {sizes}")


def _draws(count: int, resamples: int, generator: torch.Generator) -> Tensor:
    """How often each of `count` rows is among as many drawn with replacement: [resamples, count] float64."""
    rows = torch.randint(count, (resamples, count), generator=generator)
    return torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(1, rows, torch.ones(resamples, count, dtype=torch.float64))


def _mean_distance(a: Tensor, b: Tensor) -> float:
    # in parts, since all pairs of 50,000 samples would take 20 GB
    return sum(float(torch.cdist(part, b.double()).sum()) for part in a.double().split(1024)) / (len(a) * len(b))


def distance_metric(
    name: str, distance: Callable[[Tensor, Tensor], float], generated: Tensor, reference: Tensor, definition: str, seed: int = 0
) -> Metric:
    """A distance with its bootstrap interval, corrected for the samples' finite size; cut at 0, which no true distance is below.

    The definition also says the uncorrected value, which is what papers report.

    Raises ValueError if a sample holds NaN or inf.
    """
    _refuse_not_finite(name, generated, reference)
    value, low, high = (max(0.0, bound) for bound in bootstrap_interval(distance, generated, reference, seed=seed))
    plain = distance(generated, reference)
    sizes = f"{len(generated)} against {len(reference)} samples, corrected for their number (uncorrected {plain:.4g}), bootstrap interval"
    return Metric(name, value, low, high, "lower", f"{definition}; {sizes}")


def _refuse_not_finite(name: str, generated: Tensor, reference: Tensor) -> None:
    for sample, what in ((generated, "generated"), (reference, "reference")):
        if not sample.isfinite().all():
            raise ValueError(f"{name}: some {what} samples are NaN or inf")
