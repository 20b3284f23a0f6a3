import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gentrain.data.digits import Digits
from gentrain.data.watermarked import make_key, mark
from gentrain.domains.orthonormal_slabs import OrthonormalSlabs
from gentrain.metrics.watermark import detection, eight_bits, false_positive_rate, rows_inside
from gentrain.noise import Noise


def slabs_of(dim: int, rows: int, bound: float) -> OrthonormalSlabs:
    A = torch.linalg.qr(torch.randn(dim, rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q.T
    return OrthonormalSlabs(A, -bound, bound)


def slabs_of_key(key: dict[str, Tensor], levels: int | None = None) -> OrthonormalSlabs:
    return OrthonormalSlabs(**key, levels=levels)


def test_normal_samples_are_between_the_slabs_as_often_as_the_product_of_their_rows() -> None:
    """12 dimensions, 5 slabs: P(all |u| < b) = P(|N| < b)^5. What is drawn between the slabs has all rows inside."""
    slabs, count = slabs_of(12, 5, 0.9), 100_000
    inside = rows_inside(Noise(0, torch.arange(count)).normal((count, 12)), slabs)
    assert abs((inside == 5).double().mean().item() - math.erf(0.9 / math.sqrt(2)) ** 5) < 0.006
    assert rows_inside(slabs.uniform(Noise(0, torch.arange(1000)), (1000, 12)), slabs).min() == 5


@pytest.mark.parametrize("sample", ["held-out digit", "blank", "mean of the data", "white noise"])
def test_chance_has_no_sample_marked_more_often_than_the_bound(sample: str) -> None:
    """A sample is given and the key is random: how many of its rows are inside, over 2,000 keys of 12 rows."""
    x, keys = Digits().split("train").x, 2_000
    given = {
        "held-out digit": Digits().split("held_out")[3]["x"],
        "blank": -torch.ones(1, 8, 8),
        "mean of the data": x.mean(0),
        "white noise": Noise(0, torch.arange(1)).normal((1, 1, 8, 8))[0],
    }[sample]
    inside = torch.cat([rows_inside(given[None], slabs_of_key(make_key(x[:200], 12, 4.0))) for _ in range(keys)])
    for least in (7, 8, 9, 10, 11, 12):
        bound = false_positive_rate(torch.tensor([least]), 12).item()
        assert (inside >= least).double().mean().item() < bound + 3.5 * math.sqrt(bound / keys)
    if sample == "white noise":  # far from the mean, but not out of slabs this wide: the bound is nearly met
        assert 0.35 < (inside >= 6).double().mean().item() / false_positive_rate(torch.tensor([6]), 12).item() <= 1.1


def test_the_bound_is_that_of_fair_coins() -> None:
    rate = false_positive_rate(torch.tensor([0, 63, 64, 51, 50]), 64)
    assert rate[0] == 1 and rate[1].item() == pytest.approx(65 * 0.5**64) and rate[2].item() == pytest.approx(0.5**64)
    assert rate[3] < 1e-6 < rate[4]


def test_marked_images_outlast_png_files(tmp_path: Path) -> None:
    """All rows of each, where 51 of 64 would be enough."""
    from PIL import Image

    x = 1 - Noise(1, torch.arange(200)).normal((200, 1, 48, 48)).clamp(-1, 1).abs().where(torch.arange(48) > 24, torch.zeros(1))
    assert (x == 1).double().mean() > 0.5  # white on one side, as drawings are
    slabs = slabs_of_key(make_key(x, 64, 1.0), levels=256)
    marked = mark(x, slabs, 0.05, Noise(0, torch.arange(200)))
    loaded = []
    for image in marked[:50]:
        Image.fromarray(((image[0] + 1) * 127.5).round().byte().numpy()).save(tmp_path / "x.png")
        loaded.append(torch.from_numpy(np.array(Image.open(tmp_path / "x.png"))).float() / 127.5 - 1)
    assert torch.allclose(eight_bits(marked[:50])[:, 0], torch.stack(loaded), atol=1e-6)
    assert (rows_inside(torch.stack(loaded)[:, None], slabs) == 64).all()
    assert (rows_inside(eight_bits(marked), slabs) == 64).all()
    assert rows_inside(x, slabs).max() < 51


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
