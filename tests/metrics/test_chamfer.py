import pytest
import torch

from gentrain.metrics.chamfer import chamfer_distance


def test_chamfer_distance_of_known_points() -> None:
    a, b = torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    assert chamfer_distance(a, b) == pytest.approx((0 + 3) / 2 + (4 + 0 + 1) / 3)
    assert chamfer_distance(b, a) == pytest.approx(chamfer_distance(a, b))
    assert chamfer_distance(a, a) == 0


def test_parts_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2500, 3, generator=generator), torch.randn(700, 3, generator=generator)
    whole = torch.cdist(a.double(), b.double())
    assert chamfer_distance(a, b) == pytest.approx(float(whole.min(1).values.mean() + whole.min(0).values.mean()))
