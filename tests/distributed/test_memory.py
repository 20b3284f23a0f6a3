"""What a plan says that a process holds, against what engines do hold on two ranks."""

from __future__ import annotations

import pytest

from gentrain.training.memory import memory_of
from tests.distributed.cases import run_of
from tests.distributed.memory_cases import measure_all, settings
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

STATE = 0.001  # what is not counted: the step numbers of whole engines, flags
NORMS = 1000  # bytes of the norms that DeepSpeed keeps of gradients on their way to the host


def test_plans_tell_what_two_ranks_hold() -> None:
    runs = {engine: settings(engine, 2) for engine in ("torch", "zero1", "zero2-bf16", "zero2-offload")}
    # alone: a role that other losses pass through keeps a layer gathered at stage 3, which plans leave aside
    runs |= {engine: settings(engine, 2) | {"method": "flow_matching"} for engine in ("zero3", "zero3-bf16")}
    runs["adapted"] = settings("zero2", 2, adapted=True)
    ranks = run_ranks(2, measure_all, runs)
    for name, each in runs.items():
        memory = memory_of(run_of(each))
        assert memory.resting + memory.host == pytest.approx(max(rank[name].resting for rank in ranks), rel=STATE), name
        for part in memory.parts:
            if part.held is not None and part.activations is not None:
                assert part.activations.assumed == ""
                gradients = max(rank[name].gradients[part.name] for rank in ranks)
                assert part.held.gradients == pytest.approx(gradients, rel=0.01, abs=NORMS if part.host else 100), (name, part.name)
                saved = max(rank[name].saved[part.name] for rank in ranks)
                assert part.activations.saved + part.gathered == pytest.approx(saved, rel=0.15), (name, part.name)
                if "zero3" not in name:  # where gloo makes room for what it reduces once more
                    assert max(rank[name].peak[part.name] for rank in ranks) <= 1.001 * part.learning, (name, part.name)
