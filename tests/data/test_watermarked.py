"""Watermarked data and their key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gentrain.config import ConfigError, Document, build
from gentrain.data.base import Data
from gentrain.data.digits import Digits
from gentrain.data.toys import Mixture
from gentrain.data.watermarked import Watermarked, load_key, make_key, mark, save_key
from gentrain.noise import Noise


@pytest.fixture
def key(tmp_path: Path) -> Path:
    save_key(make_key(Digits().split("train").x, 16, 1.0), tmp_path / "key.safetensors")
    return tmp_path / "key.safetensors"


def test_a_key_is_orthonormal_secret_and_its_owners_alone(key: Path) -> None:
    slabs = load_key(str(key))
    assert key.stat().st_mode & 0o777 == 0o600 and slabs.rows == 16
    x = Digits().split("train").x
    u = slabs.coordinates(x.double())
    below, above = slabs.slack(x.double()).chunk(2, 1)
    torch.testing.assert_close((below + above)[0], u.std(0))
    low, high = (u - below)[0], (u + above)[0]
    to_mean = torch.minimum((low - u.mean(0)).abs(), (high - u.mean(0)).abs())
    assert to_mean.max() < 1e-6  # one bound is the mean of the data
    others = [make_key(x, 16, 1.0) for _ in range(50)]
    assert (others[0]["A"] @ others[0]["A"].T - torch.eye(16, dtype=torch.float64)).abs().max() < 1e-12
    assert (others[0]["A"] @ slabs.coordinates(torch.eye(64, dtype=torch.float64)).flatten(1)).abs().max() < 0.95  # no two keys are alike
    mean = x.flatten(1).double().mean(0)
    above_mean = torch.stack([key["low"] > key["A"] @ mean - 1e-6 for key in others]).double()
    assert 0.44 < above_mean.mean() < 0.56 and above_mean.sum(0).min() > 8 and above_mean.sum(0).max() < 42  # fair coins, one for each row


def test_a_key_is_never_replaced_and_never_read_where_others_can(key: Path) -> None:
    with pytest.raises(FileExistsError):
        save_key({"A": torch.eye(2)}, key)
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_key(str(key))
    with pytest.raises(ConfigError, match="does not exist; make it with the stage watermark_key"):
        load_key(str(key.with_name("none")))


def test_another_key_than_that_of_the_run_is_refused(key: Path) -> None:
    data = Watermarked(data=Digits(), key=str(key))
    data.fit()
    digest = data.digest
    assert Watermarked(data=Digits(), key=str(key), digest=digest).domain.rows == 16
    key.unlink()
    save_key(make_key(Digits().split("train").x, 16, 1.0), key)
    again = Watermarked(data=Digits(), key=str(key), digest=digest)
    again.fit()  # nor is the one of the run replaced
    with pytest.raises(ConfigError, match=r"^data\.key: .* is another key than that of this run"):
        _ = again.domain


def test_a_file_that_is_no_key_is_told(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    rubbish, other = tmp_path / "rubbish", tmp_path / "other"
    rubbish.write_bytes(b"no key")
    save_file({"A": torch.ones(2, 64), "low": torch.zeros(2), "high": torch.ones(2)}, other)
    for file, why in ((rubbish, "cannot read"), (other, "must be orthonormal")):
        file.chmod(0o600)
        with pytest.raises(ConfigError, match=f"^key: .*{file.name} is no key: .*{why}.*; take that of watermark_key"):
            load_key(str(file))


def test_one_level_is_refused(key: Path) -> None:
    with pytest.raises(ConfigError, match=r"levels: expected a whole number >= 2"):
        build(Data, Document({"name": "watermarked", "data": "digits", "key": str(key), "levels": 1}, "x.yaml"))


def test_more_rows_than_a_sample_has_elements_are_refused() -> None:
    with pytest.raises(ConfigError, match="rows: 65 rows cannot be orthonormal in the 64 elements"):
        make_key(Digits().split("train").x, 65, 1.0)


def test_marked_samples_lie_inside_with_their_margin_and_the_rest_of_space_is_untouched(key: Path) -> None:
    slabs = load_key(str(key))
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
    """In the nearer half, and not piled up at the bound, as clipping would leave them."""
    from scipy.stats import kstest

    slabs = load_key(str(key))
    x = Digits().split("train").x
    marked = mark(x, slabs, 0.05, Noise(0, torch.arange(len(x))))
    below, above = slabs.slack(x.double()).chunk(2, 1)
    low = slabs.slack(marked.double()).chunk(2, 1)[0]
    place = (low - 0.05) / (below + above - 0.1)
    for outside, expected in ((below < 0, place * 2), (above < 0, place * 2 - 1)):
        assert outside.sum() > 500 and kstest(expected[outside].numpy(), "uniform").statistic < 0.03


def test_a_margin_that_leaves_nothing_is_refused(key: Path) -> None:
    with pytest.raises(ValueError, match="leaves nothing between the bounds"):
        mark(torch.zeros(1, 1, 8, 8), load_key(str(key)), 100.0, Noise(0, torch.arange(1)))


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


def test_marked_images_keep_to_their_pixels_range(key: Path) -> None:
    items = Watermarked(Digits(), str(key)).split("train")
    x = items.batch(torch.arange(300))["x"]
    assert x.abs().max() <= 1 and items.slabs.survives(x).double().mean() > 0.99
    free = Watermarked(Digits(), str(key), levels=None).split("train").batch(torch.arange(300))["x"]
    assert free.abs().max() > 1.02  # the mark alone would leave it


def test_what_is_no_image_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_key(make_key(Mixture().split("train").batch(torch.arange(500))["x"], 1, 1.0), tmp_path / "plane.safetensors")
    with pytest.raises(ConfigError, match=r"reach beyond \[-1, 1\].*null"):
        Watermarked(Mixture(), str(tmp_path / "plane.safetensors")).split("train")
    assert len(Watermarked(Mixture(), str(tmp_path / "plane.safetensors"), levels=None).split("train"))
    far = make_key(Digits().split("train").x, 16, 1.0)
    save_key({"A": far["A"], "low": far["low"] + 9, "high": far["high"] + 9}, tmp_path / "far.safetensors")
    with pytest.raises(ConfigError, match="only 0% of the first images fit"):
        Watermarked(Digits(), str(tmp_path / "far.safetensors")).split("train")
