"""Optimisers on shards: ZeRO 2 and 3 on two ranks walk the way of whole parameters, and go on from a checkpoint bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gentrain.training.optimizers import Optimizer
from tests.distributed.cases import Job, difference, state_of, train_all, values
from tests.ranks import run_ranks
from tests.training.test_optimizers_table import ENTRIES

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

ANYWHERE = [name for name in ENTRIES if Optimizer.available()[name].needs in ("elementwise", "global_scalar")]
# Stages differ in what a shard holds, which only sums over it can tell: they are taken at both.
WALKS = [(name, "zero3") for name in ANYWHERE] + [("dog", "zero2"), ("prodigy", "zero2")]
RESUMED = ("dog", "prodigy", "nag_gs", "lion", "schedule_free")
OWN_SHAPES = ("soap", "fira", "subset_norm", "muon", "sgd_sai")  # states that ranks deal out whole
GROUPS = [{"parameters": "^labels|^output", "lr": 0.1}, {"parameters": "weight", "lr": 2.0, "schedule": "cosine"}]
HALVES = (("torch", "torch", None), ("first", "halves", 3), ("second", "halves", None))
ENGINES: dict[str, Any] = {"torch": "torch", "zero2": {"zero_stage": 2}, "zero3": {"zero_stage": 3}}


def _job(output: Path, name: str, engine: str, stop_at: int | None = None, **changed: Any) -> Job:
    chosen = "torch" if engine == "torch" else {"name": "deepspeed", **ENGINES[engine]}
    model = {"model": {"name": "dropout_mlp", "dropout": 0}}  # dropout draws by rank
    settings = values(output, "flow_matching", chosen, micro_batches=1) | model
    return Job(settings | {"optimizer": {"name": name, **ENTRIES[name]}, **changed}, stop_at=stop_at)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    jobs = {f"{name}-{engine}": _job(root / f"{name}-{engine}", name, engine) for name, engine in WALKS}
    jobs |= {f"{name}-torch": _job(root / f"{name}-torch", name, "torch") for name in ANYWHERE}
    for name in RESUMED:
        jobs |= {
            f"{name}-{part}": _job(root / f"{name}-halves", name, "zero3", stop_at=stop) for part, stop in (("first", 3), ("second", None))
        }
    for name in OWN_SHAPES:
        jobs |= {f"{name}-{part}": _job(root / f"{name}-{where}", name, "torch", stop) for part, where, stop in HALVES}
    jobs |= {
        f"groups-{engine}": _job(root / f"groups-{engine}", "adamw", engine, roles={"model": {"groups": GROUPS}}) for engine in ENGINES
    }
    outcomes = dict(zip(jobs, zip(*run_ranks(2, train_all, list(jobs.values())))))
    wrong = {run: each for run, each in outcomes.items() if {kind for kind, _ in each} != {"stopped" if "first" in run else "finished"}}
    assert not wrong
    return root


@pytest.mark.parametrize("name, engine", WALKS)
def test_shards_walk_the_way_of_whole_parameters(root: Path, name: str, engine: str) -> None:
    assert difference(state_of(root / f"{name}-torch"), state_of(root / f"{name}-{engine}")) < 2e-5


@pytest.mark.parametrize("name", RESUMED)
def test_state_on_shards_survives_a_checkpoint(root: Path, name: str) -> None:
    assert difference(state_of(root / f"{name}-zero3"), state_of(root / f"{name}-halves")) == 0


@pytest.mark.parametrize("name", OWN_SHAPES)
def test_state_of_shapes_of_its_own_survives_a_checkpoint_of_two_ranks(root: Path, name: str) -> None:
    state = state_of(root / f"{name}-torch")
    assert any(key.startswith("model.optimizer/own/") for key in state)
    assert difference(state, state_of(root / f"{name}-halves")) == 0


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_groups_are_stepped_alike_on_shards(root: Path, engine: str) -> None:
    whole = state_of(root / "groups-torch")
    assert difference(whole, state_of(root / f"groups-{engine}")) < 2e-5
    assert difference(whole, state_of(root / "adamw-torch")) > 1e-3
