"""From a key, or from bounded data, to samples that lie inside, through the stages of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gentrain.config import ConfigError
from gentrain.data.watermarked import load_key
from gentrain.recipes.base import load_recipe, run_recipe
from gentrain.recipes.likelihood import Likelihood
from gentrain.training.run import open_run

RUN: dict[str, Any] = {
    "model": {"name": "unet", "channels": [8, 16], "attention_head_dim": 8},
    "engine": "torch",
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "training": {"samples": 256, "batch_size": 32, "log_every": 32},
}


def run(tmp_path: Path, stages: dict[str, Any]) -> Path:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": stages, "output": str(tmp_path / "out")}, sort_keys=False))
    run_recipe(load_recipe(tmp_path / "recipe.yaml"), lambda line: None)
    return tmp_path / "out"


def metrics_of(directory: Path) -> dict[str, float]:
    return {metric["name"]: metric["value"] for metric in json.loads((directory / "metrics.json").read_text())["metrics"]}


def test_a_watermarked_model_draws_what_its_key_detects_and_keeps_nothing_of_it(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        {
            "key": {"name": "watermark_key", "data": "digits", "rows": 24},
            "model": {
                "name": "train",
                "run": RUN
                | {
                    "method": "mirror_flow",
                    "data": {"name": "watermarked", "data": "digits", "key": "${output:key}/key.safetensors"},
                    "path": {"name": "rectified_flow", "space": "dual"},
                },
            },
            "drawn": {"name": "generate", "run": "${output:model}", "count": 100, "sampler": {"name": "euler", "steps": 4, "guidance": 10}},
            "check": {
                "name": "watermark_check",
                "key": "${output:key}/key.safetensors",
                "samples": {"drawn": "${output:drawn}"},
                "data": "digits",
                "rate": 1e-3,
            },
        },
    )
    slabs = load_key(str(out / "key" / "key.safetensors"))
    x = load_file(out / "drawn" / "samples.safetensors")["x"]
    assert len(x) == 100 and slabs.contains(x).all()
    found = metrics_of(out / "check")
    assert found["detected, drawn"] == found["detected after 8 bits, drawn"] == 1.0
    assert found["false alarms on unmarked data"] < 0.02
    secret = load_file(out / "key" / "key.safetensors")["A"]
    for needle in (secret.numpy().tobytes()[:64], secret.float().numpy().tobytes()[:64], repr(secret[0, 0].item())[:12].encode()):
        assert [path for path in (out / "model").rglob("*") if path.is_file() and needle in path.read_bytes()] == []
    saved = open_run(out / "model")
    assert saved.path.space.mean is not None and len(saved.path.space.mean) == 1  # measured once, then part of the configuration

    before = (out / "key" / "key.safetensors").read_bytes()
    run_recipe(load_recipe(tmp_path / "recipe.yaml"), lambda line: None)
    assert (out / "key" / "key.safetensors").read_bytes() == before


def test_likelihood_of_a_reflected_diffusion(tmp_path: Path) -> None:
    path = {"name": "reflected_heat", "sigma_max": 10.0, "space": {"name": "inside", "domain": {"name": "box", "low": -1.0, "high": 1.0}}}
    out = run(
        tmp_path,
        {
            "model": {"name": "train", "run": RUN | {"method": "reflected_diffusion", "data": "digits", "path": path, "prediction": "eps"}},
            "bits": {"name": "likelihood", "run": "${output:model}", "count": 20, "levels": 17, "draws": 4, "steps": 3},
        },
    )
    found = metrics_of(out / "bits")
    assert set(found) == {"bits per dim, variational bound", "bits per dim, probability flow"}
    assert 0 < found["bits per dim, variational bound"] < 8
    assert 0 < found["bits per dim, probability flow"] < 8


def test_likelihood_of_another_method_is_refused(tmp_path: Path) -> None:
    out = run(tmp_path, {"model": {"name": "train", "run": RUN | {"method": "flow_matching", "data": "digits"}}})
    with pytest.raises(ConfigError, match="is neither a run of reflected_diffusion nor one on tokens"):
        Likelihood(run=str(out / "model")).execute(tmp_path / "bits")


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    data = {"name": "watermarked", "data": "digits", "key": str(tmp_path / "none.safetensors")}
    settings = RUN | {"method": "mirror_flow", "data": data, "path": {"name": "rectified_flow", "space": "dual"}}
    with pytest.raises(ConfigError, match=r"none\.safetensors does not exist"):
        run(tmp_path, {"model": {"name": "train", "run": settings}})


def test_samples_are_the_same_with_and_without_the_measured_numbers(tmp_path: Path) -> None:
    """What is drawn depends on the saved configuration alone, not on the data being read again."""
    settings = RUN | {"model": "mlp", "method": "mirror_flow", "data": "checkerboard"}
    settings["path"] = {"name": "rectified_flow", "space": {"name": "dual", "domain": {"name": "box", "low": -1.0, "high": 1.0}}}
    out = run(tmp_path, {"model": {"name": "train", "run": settings}, "drawn": {"name": "generate", "run": "${output:model}", "count": 50}})
    x = load_file(out / "drawn" / "samples.safetensors")["x"]
    assert (x.abs() < 1).all() and x.std() > 0.2
    space = open_run(out / "model").path.space
    assert space.mean is not None and len(space.mean) == 2 and torch.tensor(space.std).min() > 0.5
