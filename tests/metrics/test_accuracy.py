import math

import pytest
import torch

from gentrain.metrics.accuracy import class_accuracy


def test_wilson_interval_against_its_formula():
    asked = torch.zeros(200, dtype=torch.int64)
    predicted = asked.clone()
    predicted[:10] = 3
    metric = class_accuracy(predicted, asked)
    p, n, z = 0.95, 200, 1.959963984540054
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert metric.value == p
    assert (metric.low, metric.high) == pytest.approx((centre - half, centre + half), rel=1e-12)
    assert metric.better == "higher" and "200 samples" in metric.definition


def test_perfect_reading_keeps_an_interval():
    metric = class_accuracy(torch.arange(50), torch.arange(50))
    assert metric.value == metric.high == 1 and 0.9 < metric.low < 0.95


def test_the_interval_covers():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(300):
        right = torch.rand(100, generator=generator) < 0.9
        metric = class_accuracy(right.long(), torch.ones(100, dtype=torch.int64))
        covered += metric.low <= 0.9 <= metric.high
    assert 0.92 <= covered / 300 <= 0.98  # exact coverage at n = 100, p = 0.9 is 0.936


@pytest.mark.parametrize("lengths", [(0, 0), (3, 2)])
def test_nothing_to_count_is_refused(lengths):
    predicted, asked = (torch.zeros(n, dtype=torch.int64) for n in lengths)
    with pytest.raises(ValueError, match="as long and not empty"):
        class_accuracy(predicted, asked)
