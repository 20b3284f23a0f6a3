"""Runs inside convex sets on two ranks, and resumed: the space is measured once and the same on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import Job, difference, record_difference, records, run_of, state_of, train_all, values
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(480)]

BOX = {"name": "box", "low": -1.0, "high": 1.0}
RUNS: dict[str, dict[str, Any]] = {
    "mirror_flow": {
        "method": "mirror_flow",
        "data": "checkerboard",
        "path": {"name": "rectified_flow", "space": {"name": "dual", "domain": BOX}},
    },
    "reflected_flow": {
        "method": "reflected_flow",
        "data": "checkerboard",
        "path": {"name": "rectified_flow", "space": {"name": "inside", "domain": BOX}},
    },
    "reflected_diffusion": {
        "method": "reflected_diffusion",
        "data": "checkerboard",
        "path": {"name": "reflected_heat", "space": {"name": "inside", "domain": BOX}},
        "prediction": "eps",
    },
}
ZERO2 = {"name": "deepspeed", "zero_stage": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """alone-*: one rank, torch. whole-*: two ranks, ZeRO-2. halves-*: the same, stopped after three of six steps and resumed."""
    root = tmp_path_factory.mktemp("runs")

    def settings(name: str, run: str, engine: Any) -> dict[str, Any]:
        return values(root / f"{name}-{run}", RUNS[run]["method"], engine) | RUNS[run] | {"model": {"name": "dropout_mlp", "dropout": 0}}

    run_ranks(1, train_all, [Job(settings("alone", run, "torch")) for run in RUNS])
    jobs = [Job(settings("whole", run, ZERO2)) for run in RUNS]
    jobs += [Job(settings("halves", run, ZERO2), stop_at=stop_at) for run in RUNS for stop_at in (3, None)]
    run_ranks(2, train_all, jobs)
    return root


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_give_the_curve_of_one(root: Path, run: str) -> None:
    alone, whole = root / f"alone-{run}", root / f"whole-{run}"
    assert len(records(alone)) == 6
    assert record_difference(records(alone), records(whole)) <= 1e-6
    assert difference(state_of(alone), state_of(whole)) <= 1e-6


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(root: Path, run: str) -> None:
    whole, halves = root / f"whole-{run}", root / f"halves-{run}"
    assert records(whole) == records(halves)
    assert difference(state_of(whole), state_of(halves)) == 0


def test_what_the_space_measures_is_the_same_each_time() -> None:
    settings = values(Path("unused"), "mirror_flow") | RUNS["mirror_flow"]
    first, second = run_of(settings), run_of(settings)
    for run in (first, second):
        run.fit_space()
    assert first.path.space == second.path.space != run_of(settings).path.space
