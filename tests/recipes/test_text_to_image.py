"""The recipe that makes a text-to-image pipeline from nothing: the order of its stages, and their outputs at the end of a tiny one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from gentrain.config import ConfigError
from gentrain.recipes.base import _dependencies, load_recipe
from gentrain.recipes.evaluate import read_metrics
from gentrain.recipes.likeness import Likeness
from tests.methods.captioned import CaptionedPatches
from tests.models.pipelines import stable_diffusion

RECIPE = Path(__file__).parents[2] / "configs" / "recipes" / "emoji_text_to_image.yaml"


@pytest.mark.parametrize("inside", [False, True])
def test_stages_know_what_they_read_before_and_after_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool) -> None:
    """Settings, by which stages are skipped, must not change when the pipeline appears; output may be relative."""
    monkeypatch.chdir(tmp_path)
    output = "out" if inside else str(tmp_path / "out")
    before = load_recipe(RECIPE, [f"output={output}"])
    read = {name: _dependencies(before, stage) for name, stage in before.stages.items()}
    assert read == {
        "autoencoder": [], "pipeline": ["autoencoder"], "latents": ["pipeline"], "model": ["pipeline", "latents"], "seen": ["model"],
        "held_out": ["model"], "scores": ["seen", "held_out"], "export": ["model", "scores"],
    }  # fmt: skip
    stable_diffusion(tmp_path / "out" / "pipeline")
    after = load_recipe(RECIPE, [f"output={output}"])
    assert {name: _dependencies(after, stage) for name, stage in after.stages.items()} == read
    for name in ("pipeline", "latents", "model", "seen", "scores"):
        assert before.stages[name].settings() == after.stages[name].settings()


def drawn(directory: Path, x: Any, caption: Any) -> str:
    directory.mkdir()
    save_file({"x": x, "label": caption}, directory / "samples.safetensors")
    return str(directory)


def test_likeness_ranks_each_picture_against_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gentrain.recipes.likeness.efficientnet_features", lambda x: x.flatten(1))
    data = CaptionedPatches()
    items = data.split("held_out")
    right = drawn(tmp_path / "right", items.x + 0.1, items.caption)
    wrong = drawn(tmp_path / "wrong", items.x, items.caption.roll(3))
    Likeness({"right": right, "wrong": wrong}, data).execute(tmp_path / "scores")
    metrics = {metric["name"]: metric for metric in read_metrics(tmp_path / "scores")}
    assert metrics["median rank, right"]["value"] == 0 and metrics["median rank, wrong"]["value"] > 20
    assert metrics["median rank, right, another's picture"]["value"] > 20


def test_a_missing_network_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    data = CaptionedPatches()
    items = data.split("held_out")
    with pytest.raises(ConfigError, match=r"EfficientNet-Lite0 is read from the package efficientnet_lite_pytorch.*pip install"):
        Likeness({"a": drawn(tmp_path / "a", items.x, items.caption)}, data).execute(tmp_path / "scores")
