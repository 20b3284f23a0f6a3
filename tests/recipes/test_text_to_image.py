"""The recipe that makes a text-to-image pipeline from nothing: the order of its stages, and their outputs at the end of a tiny one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gentrain.config import ConfigError
from gentrain.recipes.base import _dependencies, load_recipe
from gentrain.recipes.evaluate import read_metrics
from gentrain.recipes.likeness import DrawCaptions, Likeness
from gentrain.samplers.euler import Euler
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


def test_each_caption_is_drawn_and_shown_above_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def generate(run: str, sampler: Any, labels: torch.Tensor, seed: int, prompts: list[str]) -> torch.Tensor:
        asked.update(run=run, seed=seed, prompts=prompts, rows=len(labels))
        return torch.full((len(labels), 3, 6, 6), 0.5)

    monkeypatch.setattr("gentrain.recipes.likeness.generate", generate)
    monkeypatch.setattr("gentrain.recipes.likeness.open_run", lambda run: SimpleNamespace(drawn_with=lambda sampler: sampler))
    data = CaptionedPatches()
    DrawCaptions("the/run", data, count=6, sampler=Euler(steps=3), seed=7, columns=3).execute(tmp_path)
    saved = load_file(tmp_path / "samples.safetensors")
    held_out = data.split("held_out")
    assert set(saved["label"].tolist()) <= set(held_out.caption.tolist()) and len(saved["label"]) == 6
    assert asked == {"run": "the/run", "seed": 7, "rows": 6, "prompts": [data.captions[place] for place in saved["label"].tolist()]}
    info = json.loads((tmp_path / "info.json").read_text())
    assert info["names"] == asked["prompts"] and info["drawn"] == "euler, 3 steps, guidance 1"
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    assert grid.shape == (4 * 16, 3 * 16, 3)  # twice three drawn, and the real ones below, of 6 pixels with a margin, twice as large
    assert (grid[2:14, 2:14] == 191).all() and not (grid[18:30, 2:14] == 191).any()
    assert (grid[34:46, 2:14] == 191).all()


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
