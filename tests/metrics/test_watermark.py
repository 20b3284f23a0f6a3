import math

import pytest
import torch

from gentrain.domains.orthonormal_slabs import OrthonormalSlabs
from gentrain.metrics.watermark import detection, eight_bits, false_positive_rate, rows_inside
from gentrain.noise import Noise


def slabs_of(dim: int, rows: int, bound: float) -> OrthonormalSlabs:
    A = torch.linalg.qr(torch.randn(dim, rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q.T
    return OrthonormalSlabs(A, -bound, bound)


def test_unmarked_normal_samples_pass_as_often_as_the_product_of_their_rows() -> None:
    """12 dimensions, 5 slabs: P(all |u| < b) = P(|N| < b)^5, and the binomial law of the rows inside."""
    slabs, count = slabs_of(12, 5, 0.9), 100_000
    inside = rows_inside(Noise(0, torch.arange(count)).normal((count, 12)), slabs)
    coverage = math.erf(0.9 / math.sqrt(2))
    for least in range(6):
        expected = false_positive_rate(torch.tensor([least]), 5, coverage).item()
        assert abs((inside >= least).double().mean().item() - expected) < 0.006
    assert false_positive_rate(torch.tensor([5]), 5, coverage).item() == pytest.approx(coverage**5)
    assert rows_inside(slabs.uniform(Noise(0, torch.arange(1000)), (1000, 12)), slabs).min() == 5


def test_rounding_to_eight_bits_moves_coordinates_by_two_thousandths() -> None:
    """2 / 255 / sqrt(12) for a unit row: a margin of 0.05 is 20 deviations."""
    slabs = slabs_of(300, 20, 1.0)
    x = Noise(0, torch.arange(500)).uniform((500, 300), -1, 1)
    shift = slabs.coordinates(eight_bits(x)) - slabs.coordinates(x)
    assert shift.std().item() == pytest.approx(2 / 255 / math.sqrt(12), rel=0.05)
    assert shift.abs().max() < 0.02
    assert eight_bits(torch.tensor([-2.0, 2.0])).tolist() == [-1.0, 1.0]


def test_shares_come_with_wilsons_interval() -> None:
    metric = detection("detected", torch.tensor([True] * 8 + [False] * 2), "higher", 1e-6)
    assert metric.value == 0.8 and 0.4 < metric.low < 0.8 < metric.high < 1 and "1e-06" in metric.definition
