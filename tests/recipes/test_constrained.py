"""From a key, or from bounded data, to samples that lie inside, through the stages of a recipe."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from gentrain.config import ConfigError
from gentrain.data.digits import Digits
from gentrain.data.watermarked import load_key
from gentrain.domains.simplex import Simplex
from gentrain.metrics import free_likelihood
from gentrain.recipes.base import load_recipe, run_recipe
from gentrain.recipes.likelihood import Likelihood
from gentrain.recipes.watermark import WatermarkCheck
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


def test_likelihood_of_a_flow_and_of_what_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = RUN | {"method": "flow_matching", "data": "digits"}
    mirror = RUN | {"method": "mirror_flow", "model": "mlp", "data": "checkerboard"}
    mirror["path"] = {"name": "rectified_flow", "space": {"name": "dual", "domain": {"name": "box", "low": -1.0, "high": 1.0}}}
    out = run(
        tmp_path,
        {
            "model": {"name": "train", "run": flow},
            "bits": {"name": "likelihood", "run": "${output:model}", "count": 120, "levels": 17, "draws": 4, "steps": 3},
            "densities": {"name": "likelihood", "run": "${output:model}", "count": 20, "draws": 4},
            "mirror": {"name": "train", "run": mirror},
            "judge": {"name": "train", "run": RUN | {"method": "classifier", "model": "cnn", "data": "digits"}},
        },
    )
    found = metrics_of(out / "bits")
    assert set(found) == {"bits per dim, variational bound", "bits per dim, probability flow"}
    assert 0.5 < found["bits per dim, variational bound"] < 40 and math.isfinite(found["bits per dim, probability flow"])
    assert json.loads((out / "bits" / "metrics.json").read_text())["settings"]["items"] == 120
    assert list(metrics_of(out / "densities")) == ["bits per dim, variational bound"]
    monkeypatch.setattr(free_likelihood, "flow_log_density", lambda denoiser, x, *_: torch.zeros(len(x), dtype=torch.float64))
    metrics, _ = Likelihood(str(out / "model"), count=20, levels=17, draws=1, steps=1).measure()
    assert metrics[1].value == pytest.approx(math.log2(17 / 2), rel=1e-5)  # a density of 1 on cells of width 2 / 17
    with pytest.raises(ConfigError, match="do not lie on 16 levels") as caught:
        Likelihood(str(out / "model"), count=20, levels=16).measure()
    assert caught.value.key == "levels"
    for name, message in (("mirror", "in the space dual"), ("judge", "which generates nothing")):
        with pytest.raises(ConfigError, match=message) as caught:
            Likelihood(run=str(out / name)).execute(tmp_path / "bits")
        assert caught.value.key == "run"


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


@pytest.mark.timeout(180)
def test_the_table_of_the_documents_is_trained_on_as_a_plugin(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "constrained.md").read_text()
    plugin, settings = (block for block in re.findall(r"```(?:python|yaml)\n(.*?)```", page, re.DOTALL) if "soil" in block)
    (tmp_path / "soil.py").write_text(plugin)
    (tmp_path / "soil.yaml").write_text(settings)
    parts = torch.distributions.Dirichlet(torch.tensor([5.0, 3.0, 1.0])).sample((200,))
    rows = "\n".join(",".join(f"{100 * part:.1f}" for part in row) for row in parts.tolist())
    (tmp_path / "soil.csv").write_text("sand,silt,clay\n" + rows)
    gentrain = Path(sys.executable).with_name("gentrain")
    for command in ("train soil.yaml training.samples=512", "sample runs/soil count=50"):
        done = subprocess.run(
            [gentrain, *command.split()],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=85,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    x = load_file(tmp_path / "runs" / "soil" / "generated" / "samples.safetensors")["x"]
    assert x.shape == (50, 2) and Simplex(2).contains(x).all()


def test_a_key_of_other_images_is_told(tmp_path: Path) -> None:
    stages = {"key": {"name": "watermark_key", "data": "digits", "rows": 24}}
    key = run(tmp_path, stages) / "key" / "key.safetensors"
    (tmp_path / "drawn").mkdir()
    save_file({"x": torch.zeros(3, 3, 24, 24)}, tmp_path / "drawn" / "samples.safetensors")
    check = WatermarkCheck(key=str(key), samples={"drawn": str(tmp_path / "drawn")}, data=Digits(), rate=1e-3)
    with pytest.raises(ConfigError, match=r"^key: .*of 64 elements, got samples of shape \(3, 24, 24\); take a key"):
        check.execute(tmp_path / "check")
