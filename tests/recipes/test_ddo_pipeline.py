"""A round of DDO of a pretrained pipeline with LoRA: its reference is the pipeline with the adapter off, which also drew the pool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gentrain import cli
from gentrain.models.adapters import digest_of
from gentrain.recipes.base import load_recipe, run_recipe
from gentrain.training.roles import load_weights
from tests.distributed.cases import state_of
from tests.models.pipelines import images
from tests.test_lcm_lora import flow_pipeline


def stages(root: Path, decoded: bool) -> dict[str, Any]:
    model = {"name": "pretrained", "directory": str(root / "pipeline")}
    data = images(root / "images")
    run = {
        "method": {"name": "ddo", "pool": "${output:fakes}", "alpha": 2, "beta": 0.1, "label_dropout": 0.3},
        "data": data, "model": model, "adapter": {"rank": 2, "targets": ["attention"]}, "engine": "torch",
        "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.0}, "sampler": {"name": "euler", "steps": 2},
        "training": {"samples": 12, "batch_size": 4, "log_every": 4},
    }  # fmt: skip
    return {
        "pipeline": {"name": "adopt", "model": model, "data": data, "sampler": {"name": "euler", "steps": 2}},
        "fakes": {"name": "generate", "run": "${output:pipeline}", "count": 8, "decoded": decoded},
        "round": {"name": "train", "run": run},
    }


@pytest.mark.parametrize("decoded", [False, True], ids=["latents", "images"])
def test_a_round_of_a_pipeline_begins_as_the_pipeline(tmp_path: Path, decoded: bool, capsys: pytest.CaptureFixture[str]) -> None:
    flow_pipeline(tmp_path / "pipeline")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stages": stages(tmp_path, decoded), "output": str(tmp_path / "out")}, sort_keys=False))
    run_recipe(load_recipe(path), lambda line: None)
    out = tmp_path / "out"
    info = json.loads((out / "fakes" / "info.json").read_text())
    assert info["weights"] == digest_of(load_weights(str(out / "pipeline")))
    assert load_file(out / "fakes" / "samples.safetensors")["x"].shape[1] == (3 if decoded else 4)
    lines = [json.loads(line) for line in (out / "round" / "metrics.jsonl").read_text().splitlines()]
    assert (lines[0]["log_ratio_square"], lines[0]["model_loss"]) == (0, lines[0]["reference_loss"])
    assert lines[-1]["log_ratio_square"] > 0
    learnt = state_of(out / "round")
    assert all("lora" in name for name in learnt if name.startswith("model.weights"))
    assert any(torch.as_tensor(value).abs().sum() > 0 for name, value in learnt.items() if "lora_B" in name)
    assert cli._guarded(lambda **options: cli.app(args=["plan", str(path)], **options)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "round needs" in printed and "one after the other" in printed
