"""The stage `evaluate` on the features of a pretrained network, and on a fleet."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gentrain.config import ConfigError, Document, build
from gentrain.data.digits import Digits
from gentrain.metrics import features as of_features
from gentrain.recipes import features as reading
from gentrain.recipes.evaluate import Evaluate, read_metrics
from gentrain.recipes.features import CACHE, FeatureSource
from tests.models.readers import vit


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gentrain" / CACHE


def drawn(directory: Path, x: torch.Tensor) -> str:
    directory.mkdir()
    save_file({"x": x.contiguous(), "label": torch.zeros(len(x), dtype=torch.int64)}, directory / "samples.safetensors")
    return str(directory)


def evaluate(directory: Path, **settings: Any) -> dict[str, dict[str, Any]]:
    build(Evaluate, Document({"data": "digits", **settings}, "test")).execute(directory)
    return {metric["name"]: metric for metric in read_metrics(directory)}


def test_features_of_a_pretrained_network(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Digits().split("train").x
    sets = {"like": drawn(tmp_path / "like", real[:300]), "unlike": drawn(tmp_path / "unlike", -real[:300])}
    encoder = {"name": "image_encoder", "directory": str(vit(tmp_path / "vit"))}
    metrics = evaluate(tmp_path / "scores", samples=sets, features=encoder)
    kinds = ["Frechet distance", "kernel distance", "precision", "recall", "coverage", "density"]
    assert list(metrics) == [f"{kind}, {name}" for name in sets for kind in kinds]
    assert "of vit's 16 features; 300 against" in metrics["Frechet distance, like"]["definition"]
    for kind in kinds[:2]:
        assert metrics[f"{kind}, like"]["value"] < 0.1 * metrics[f"{kind}, unlike"]["value"]
    assert len(list(cache.iterdir())) == 1
    asked: list[int] = []
    read = FeatureSource.read
    monkeypatch.setattr(FeatureSource, "read", lambda self, x: asked.append(len(x)) or read(self, x))
    assert evaluate(tmp_path / "again", samples=sets, features=encoder) == metrics
    assert asked == [300, 300]  # those of held-out items were known


def test_distances_are_compared_with_a_baseline_in_pairs(tmp_path: Path) -> None:
    real = Digits().split("train").x[:300]
    worse, order = 0.9 * real, torch.randperm(300, generator=torch.Generator().manual_seed(0))
    sets = {name: drawn(tmp_path / name, x) for name, x in {"base": real, "worse": worse, "shuffled": worse[order]}.items()}
    encoder = {"name": "image_encoder", "directory": str(vit(tmp_path / "vit"))}
    metrics = evaluate(tmp_path / "scores", samples=sets, features=encoder, baseline="base")
    assert "Frechet distance, base minus base" not in metrics
    paired, apart = (metrics[f"Frechet distance, {name} minus base"] for name in ("worse", "shuffled"))
    plain = metrics["Frechet distance, worse"]["value"] - metrics["Frechet distance, base"]["value"]
    for found in (paired, apart):
        assert found["low"] < found["value"] < found["high"]
        assert found["value"] == pytest.approx(plain, rel=0.25)
    assert paired["low"] > 0  # worse is further away
    assert paired["high"] - paired["low"] < 0.7 * (apart["high"] - apart["low"])


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"baseline": "bas"}, "baseline: no samples of that name; choose one of base, few"),
        ({"baseline": "base", "features": None}, "baseline: only distances of features are compared"),
        ({"baseline": "base", "samples": {"base": "drawn"}}, "baseline: these are the only samples; name others beside them"),
        ({"baseline": "base"}, "samples.few: 200 samples, and 300 of base; draw as many"),
    ],
)
def test_a_baseline_that_cannot_be_one(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    real = Digits().split("train").x
    sets = {name: drawn(tmp_path / name, real[:count]) for name, count in (("base", 300), ("few", 200))}
    encoder = {"name": "image_encoder", "directory": str(vit(tmp_path / "vit"))}
    with pytest.raises(ConfigError, match=told):
        evaluate(tmp_path / "scores", **{"samples": sets, "features": encoder, **changes})


def test_portions_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than one portion of a fleet or of a network."""
    source = FeatureSource(None, of_features.ImageEncoder(str(vit(tmp_path / "vit"))), 0)
    x = Digits().split("train").x[:130]
    whole = source.read(x)
    monkeypatch.setattr(reading, "BATCH", 30)
    assert whole.shape == (130, 16)
    torch.testing.assert_close(source.read(x), whole, atol=1e-5, rtol=1e-4)


def test_more_features_than_samples_leave_the_frechet_distance_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sets = {"few": drawn(tmp_path / "few", Digits().split("train").x[:12])}
    with caplog.at_level(logging.WARNING):
        metrics = evaluate(tmp_path / "scores", samples=sets, features={"name": "image_encoder", "directory": str(vit(tmp_path / "vit"))})
    assert "kernel distance, few" in metrics and "Frechet distance, few" not in metrics
    assert "left out, few: 12 samples and" in caplog.text


def test_distances_of_inception_are_called_fid_and_kid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tiny(torch.nn.Module):
        features = staticmethod(lambda x: x.flatten(1)[:, 20:24])

    monkeypatch.setattr(of_features.InceptionFeatures, "network", lambda self: Tiny())
    sets = {"mine": drawn(tmp_path / "mine", Digits().split("train").x[:50])}
    metrics = evaluate(tmp_path / "scores", samples=sets, features={"name": "inception", "weights": "there"})
    assert list(metrics)[:2] == ["FID, mine", "KID, mine"]
    assert "of Inception's 4 features" in metrics["FID, mine"]["definition"]


def test_what_has_no_features_is_refused(tmp_path: Path) -> None:
    sets = {"mine": drawn(tmp_path / "mine", Digits().split("train").x[:50])}
    with pytest.raises(ConfigError, match=r"features: nowhere.pth is no file; download pt_inception"):
        evaluate(tmp_path / "scores", samples=sets, features={"name": "inception", "weights": "nowhere.pth"})
    points = {"points": drawn(tmp_path / "points", torch.zeros(50, 2))}
    with pytest.raises(ConfigError, match=r"features: it reads images with 1 or 3 channels, these samples have the shape \[2\]"):
        evaluate(tmp_path / "scores", samples=points, data="rings", features={"name": "inception", "weights": "nowhere.pth"})


def test_the_size_of_the_fleet_changes_no_setting() -> None:
    one, many = (
        build(Evaluate, Document({"data": "digits", "samples": {"a": "b"}, "actors": actors}, "test")).settings() for actors in (0, 3)
    )
    assert one == many
