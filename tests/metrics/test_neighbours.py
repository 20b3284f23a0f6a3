import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from gentrain.metrics.neighbours import neighbour_metrics, neighbourhoods


def by_definition(generated, real, k):
    """(precision, recall, density, coverage) with scikit-learn's neighbours."""

    def radii(x):
        return NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, k]

    generated, real = generated.double().numpy(), real.double().numpy()
    distance = np.linalg.norm(generated[:, None] - real[None], axis=2)
    in_real, in_generated = distance <= radii(real)[None], distance <= radii(generated)[:, None]
    return in_real.any(1).mean(), in_generated.any(0).mean(), in_real.sum() / (k * len(generated)), in_real.any(0).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_equals_the_definitions(k):
    generator = torch.Generator().manual_seed(k)
    generated = torch.randn(1300, 4, generator=generator)  # more than one part of rows
    real = 1.3 * torch.randn(300, 4, generator=generator) + 0.3
    found = neighbourhoods(generated, real, k)
    ours = [float(x.double().mean()) for x in (found.realistic, found.reached)] + [found.density, float(found.covered.double().mean())]
    assert ours == pytest.approx(by_definition(generated, real, k), abs=1e-12)


def test_lost_modes_cost_recall_and_coverage_and_outliers_cost_precision():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0], [20, 0]])
    real = centres[torch.arange(400) % 2] + torch.randn(400, 2, generator=generator)
    one_mode, strays = torch.randn(400, 2, generator=generator), centres[torch.arange(400) % 2] + torch.randn(400, 2, generator=generator)
    strays[::4] += 100
    lost, wild, same = (neighbourhoods(x, real) for x in (one_mode, strays, real))
    share = lambda x: float(x.double().mean())  # noqa: E731
    assert share(lost.realistic) > 0.9 and share(lost.reached) < 0.55 and share(lost.covered) < 0.55
    assert 0.65 < share(wild.realistic) <= 0.75 and share(wild.covered) > 0.8
    assert share(same.realistic) == share(same.reached) == share(same.covered) == 1.0


def test_density_of_equal_laws_is_one_and_falls_outside_of_the_data():
    generator = torch.Generator().manual_seed(0)
    real, fresh = (torch.randn(2000, 3, generator=generator) for _ in range(2))
    assert neighbourhoods(fresh, real).density == pytest.approx(1, abs=0.08)
    assert neighbourhoods(10 * fresh, real).density < 0.3


def test_metrics_carry_intervals_and_say_what_they_are():
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(100, 2, generator=generator), torch.randn(80, 2, generator=generator)
    metrics = neighbour_metrics(generated, real, "a", "of points")
    found = neighbourhoods(generated, real)
    shares = [float(x.double().mean()) for x in (found.realistic, found.reached, found.covered)]
    assert [metric.name for metric in metrics] == ["precision, a", "recall, a", "coverage, a", "density, a"]
    assert [metric.value for metric in metrics] == pytest.approx([*shares, found.density])
    for metric in metrics:
        assert metric.low < metric.value <= metric.high and metric.better == "higher" and "80 against 100" in metric.definition


def test_the_interval_of_the_density_covers_that_of_more_samples_of_the_model():
    """29 of 30, measured; given the balls, so the real samples stay."""
    real = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    many = neighbourhoods(torch.randn(4_000, 2, generator=torch.Generator().manual_seed(1)), real).density
    draws = [torch.randn(150, 2, generator=torch.Generator().manual_seed(10 + seed)) for seed in range(30)]
    metrics = [neighbour_metrics(x, real, "a", "of points")[3] for x in draws]
    assert sum(metric.low <= many <= metric.high for metric in metrics) >= 25


@pytest.mark.parametrize("k", [0, 10, 11])
def test_neighbours_that_do_not_exist_are_refused(k):
    with pytest.raises(ValueError, match="k must be from 1 to below the number of samples, 20 and 10"):
        neighbourhoods(torch.randn(20, 2), torch.randn(10, 2), k)
