"""Watermarked data and their key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gentrain.config import ConfigError, Document, build
from gentrain.data.base import Data
from gentrain.data.digits import Digits
from gentrain.data.watermarked import Watermarked, load_key, make_key, mark, save_key
from gentrain.noise import Noise


@pytest.fixture
def key(tmp_path: Path) -> Path:
    save_key(make_key(Digits().split("train").x, 16, 1.0), tmp_path / "key.safetensors")
    return tmp_path / "key.safetensors"


def test_a_key_is_orthonormal_secret_and_its_owners_alone(key: Path) -> None:
    slabs, coverage = load_key(str(key))
    assert key.stat().st_mode & 0o777 == 0o600
    x = Digits().split("train").x
    u = slabs.coordinates(x.double())
    assert u.shape == (len(x), 16)
    below, above = slabs.slack(x.double()).chunk(2, 1)
    torch.testing.assert_close((below + above)[0] / 2, u.std(0))
    assert coverage == pytest.approx(((below > 0) & (above > 0)).double().mean().item())
    assert 0.6 < coverage < 0.75  # 0.68 of a normal law
    another = make_key(x, 16, 1.0)["A"]
    assert (another @ another.T - torch.eye(16, dtype=torch.float64)).abs().max() < 1e-12
    assert (another @ slabs.coordinates(torch.eye(64, dtype=torch.float64)).flatten(1)).abs().max() < 0.95  # no two keys are alike


def test_a_key_is_never_replaced_and_never_read_where_others_can(key: Path) -> None:
    with pytest.raises(FileExistsError):
        save_key({"A": torch.eye(2)}, key)
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_key(str(key))
    with pytest.raises(ConfigError, match="does not exist; make it with the stage watermark_key"):
        load_key(str(key.with_name("none")))


def test_marked_samples_lie_inside_with_their_margin_and_the_rest_of_space_is_untouched(key: Path) -> None:
    slabs, _ = load_key(str(key))
    x = Digits().split("train").x[:500]
    marked = mark(x, slabs, 0.05, Noise(0, torch.arange(500)))
    assert slabs.contains(marked).all()
    assert slabs.slack(marked.double()).min() > 0.049
    change = (marked - x).double().flatten(1)
    rows = slabs.coordinates(torch.eye(64, dtype=torch.float64)).T  # A
    assert (change - change @ rows.T @ rows).abs().max() < 1e-5
    before, after = slabs.coordinates(x.double()), slabs.coordinates(marked.double())
    well_inside = slabs.slack(x.double()).chunk(2, 1)
    kept = (well_inside[0] > 0.051) & (well_inside[1] > 0.051)
    assert (after - before)[kept].abs().max() < 1e-5


def test_redrawn_coordinates_are_uniform_between_the_bounds(key: Path) -> None:
    """And not piled up at them, as clipping would leave them."""
    from scipy.stats import kstest

    slabs, _ = load_key(str(key))
    x = Digits().split("train").x
    marked = mark(x, slabs, 0.05, Noise(0, torch.arange(len(x))))
    below, above = slabs.slack(x.double()).chunk(2, 1)
    outside = (below < 0) | (above < 0)
    low = slabs.slack(marked.double()).chunk(2, 1)[0]
    place = ((low - 0.05) / (below + above - 0.1))[outside]
    assert len(place) > 1000 and kstest(place.numpy(), "uniform").statistic < 0.03


def test_a_margin_that_leaves_nothing_is_refused(key: Path) -> None:
    with pytest.raises(ValueError, match="leaves nothing between the bounds"):
        mark(torch.zeros(1, 1, 8, 8), load_key(str(key))[0], 100.0, Noise(0, torch.arange(1)))


def test_the_data_set_brings_its_slabs_and_marks_an_item_the_same_each_time(key: Path) -> None:
    settings = {"name": "watermarked", "data": "digits", "key": str(key)}
    data = build(Data, Document(settings, "x.yaml"))
    assert isinstance(data, Watermarked)
    items = data.split("train")
    assert (data.shape, len(items), data.class_names) == ((1, 8, 8), len(Digits().split("train")), Digits().class_names)
    assert (
        torch.equal(items.batch(torch.tensor([5, 3]))["x"][1], items[3]["x"]) and items[3]["label"] == Digits().split("train")[3]["label"]
    )
    assert data.domain.contains(items[3]["x"][None]).all() and "watermarked" in data.licence
