"""Few-step students of a pretrained pipeline that reads texts: whole networks and LoRA roles, by every method of the family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gentrain.config import Document
from gentrain.noise import Noise, derive
from gentrain.training.loop import train
from gentrain.training.roles import Roles, load_network
from gentrain.training.run import parse_run, save_config
from gentrain.training.world import World
from tests.distributed.cases import state_of
from tests.models.pipelines import PROMPTS, images
from tests.test_lcm_lora import flow_pipeline

ALONE = World(0, 1, torch.device("cpu"))
METHODS: dict[str, dict[str, Any]] = {
    "consistency_distillation": {"guidance": 2.0},
    "latent_consistency": {"guidance": [2, 2], "count": 10, "stride": 100},
    "consistency_training": {},
    "easy_consistency_tuning": {},
    "continuous_consistency": {"guidance": 2.0, "derivative": "difference"},
    "continuous_consistency, jvp": {},
}


def settings(root: Path, name: str, lora: bool) -> dict[str, Any]:
    method = name.partition(",")[0]
    return {
        "method": {"name": method, **METHODS[name]},
        "data": images(root / "images"),
        "model": {"name": "pretrained", "directory": str(root / "pipeline")},
        "adapter": {"rank": 2, "targets": ["attention"]} if lora else None,
        "engine": "torch",
        "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.0},
        "training": {"samples": 12, "batch_size": 4, "log_every": 4},
        "output": str(root / "run"),
    }


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("name", METHODS)
def test_a_pipeline_gets_a_student_that_draws_texts(tmp_path: Path, name: str, lora: bool) -> None:
    flow_pipeline(tmp_path / "pipeline")
    run = parse_run(Document(settings(tmp_path, name, lora), "x.yaml"))
    role = str(run.method.generator)
    begin = Roles(run, ALONE).engines[role].weights()
    save_config(run)
    train(run, ALONE, lambda: False)
    denoiser, loaded = load_network(run.directory)
    learnt = state_of(run.directory)
    assert all(("lora" in key) == lora for key in begin)
    assert any(not torch.equal(torch.as_tensor(learnt[f"{role}.weights/{key}"]), value) for key, value in begin.items())
    codec = loaded.codec()
    drawn = []
    for prompts in (PROMPTS, [*reversed(PROMPTS)]):
        noise = Noise(derive(0, "sample"), torch.arange(len(prompts)))
        with torch.no_grad():
            condition = codec.condition(torch.arange(len(prompts)), prompts)
            drawn.append(loaded.sampler.sample(denoiser, (len(prompts), *codec.shape), noise, condition))
    assert torch.isfinite(drawn[0]).all() and not torch.equal(*drawn)
