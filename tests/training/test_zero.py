"""How DeepSpeed is configured; what it does is in tests/distributed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gentrain.config import ConfigError
from gentrain.training.optimizers import Optimizer
from gentrain.training.zero import _OWNED, DeepSpeedEngine, _ShardedEngine
from tests.distributed.cases import run_of, values


def _nested(key: str) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    return {head: {rest: 1} if rest else 1}


@pytest.mark.parametrize("key", _OWNED)
def test_keys_that_the_engine_sets_are_refused_with_what_to_set_instead(key: str) -> None:
    engine = {"name": "deepspeed", "settings": _nested(key)}
    with pytest.raises(ConfigError) as raised:
        run_of(values(Path("unused"), "flow_matching", engine))
    assert f"engine.settings.{key}" in str(raised.value) and _OWNED[key] in str(raised.value)


def test_bf16_needs_stage_1() -> None:
    with pytest.raises(ConfigError, match=r"engine\.zero_stage: bf16 needs zero_stage 1"):
        run_of(values(Path("unused"), "flow_matching", {"name": "deepspeed", "zero_stage": 0, "precision": "bf16"}))


def test_offloading_needs_stage_1_and_any_of_our_optimisers_will_do() -> None:
    with pytest.raises(
        ConfigError, match=r"engine\.offload_optimizer: DeepSpeed offloads optimisers at ZeRO stages 1 to 3; set zero_stage"
    ):
        run_of(values(Path("unused"), "flow_matching", {"name": "deepspeed", "zero_stage": 0, "offload_optimizer": True}))
    config = DeepSpeedEngine(zero_stage=2, offload_optimizer=True).deepspeed_config()
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu" and config["zero_force_ds_cpu_optimizer"] is False
    plain = DeepSpeedEngine(zero_stage=2).deepspeed_config()
    assert "offload_optimizer" not in plain["zero_optimization"] and "zero_force_ds_cpu_optimizer" not in plain


@pytest.mark.parametrize("stage, clipping, written", [(0, 0.5, 0.0), (1, 0.5, 0.5), (2, None, 0.0), (3, 2.0, 2.0)])
def test_clipping_is_always_said(stage: Any, clipping: float | None, written: float) -> None:
    """DeepSpeed clips at 1.0 where it is left out; at stage 0 the engine clips, which needs the norm to judge the step."""
    config = DeepSpeedEngine(zero_stage=stage, gradient_clipping=clipping).deepspeed_config()
    assert config["gradient_clipping"] == written
    assert config["zero_optimization"] == {"stage": stage, "memory_efficient_linear": False, "reduce_bucket_size": 500_000_000}


def test_further_settings_are_merged_beside_our_own() -> None:
    settings = {"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True}
    config = DeepSpeedEngine(zero_stage=2, settings=settings).deepspeed_config(1_000)
    whole = {"stage": 2, "memory_efficient_linear": False, "reduce_bucket_size": 1_000}  # no more room than for all its parameters
    assert config["zero_optimization"] == whole | {"overlap_comm": False}
    assert config["wall_clock_breakdown"] is True


def test_sums_over_all_parameters_of_several_groups_are_refused() -> None:
    engine = object.__new__(_ShardedEngine)
    engine.role, engine.optimizer = "model", Optimizer.available()["dog"]().build([nn.Parameter(torch.ones(2))])
    engine.partitions = [torch.ones(2)]
    engine._check_sums()
    engine.partitions *= 2
    with pytest.raises(ConfigError, match=r"optimizer: .*role 'model' in 2 groups.*set engine\.zero_stage to 0"):
        engine._check_sums()


def test_an_engine_starts_without_torchs_compiler() -> None:
    """Which DeepSpeed's Muon would import, seconds of every run's start."""
    code = """
import sys
from torch import nn
from gentrain.training.optimizers import AdamW
from gentrain.training.world import join, leave
from gentrain.training.zero import DeepSpeedEngine
for stage in (1, 3):
    engine = DeepSpeedEngine(zero_stage=stage).build("model", nn.Linear(2, 2), AdamW(), join())
assert "deepspeed.runtime.zero.muon.original_muon" in sys.modules
print([name for name in ("torch._inductor.compile_fx", "torch._inductor.lowering") if name in sys.modules])
leave()
from deepspeed.runtime import compiler
print(compiler.compile.__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.splitlines()[-2:] == ["[]", "deepspeed.runtime.compiler"]
