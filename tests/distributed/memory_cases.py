"""Runs whose memory is planned and measured, in a module of its own for spawned ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.plan import Found, measure
from gentrain.training.world import World
from tests.distributed.adapter_cases import ADAPTER
from tests.distributed.cases import run_of, values

ENGINES: dict[str, Any] = {
    "torch": {"name": "torch"},
    "torch-bf16": {"name": "torch", "precision": "bf16"},
    "zero0": {"name": "deepspeed", "zero_stage": 0},
    **{f"zero{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)},
    **{f"zero{stage}-bf16": {"name": "deepspeed", "zero_stage": stage, "precision": "bf16"} for stage in (1, 2, 3)},
    **{f"zero{stage}-offload": {"name": "deepspeed", "zero_stage": stage, "offload_optimizer": True} for stage in (1, 2, 3)},
}


def settings(engine: str, workers: int = 1, adapted: bool = False, **training: Any) -> dict[str, Any]:
    """Two roles that learn with two losses each, two micro-batches, and two frozen roles; some weights are too small to be shared out."""
    found = values(Path("unused"), "duet" if adapted else "relay", ENGINES[engine], **training)
    found |= {"model": {"name": "mlp", "width": 323}, "cluster": {"place": "ray", "workers": workers}}
    return found | ({"adapter": ADAPTER} if adapted else {})


def measure_all(world: World, runs: dict[str, dict[str, Any]]) -> dict[str, Found]:
    """What this rank of each run holds."""
    return {name: measure(world, run_of(each)) for name, each in runs.items()}
