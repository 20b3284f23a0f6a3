"""One-step distillation on two ranks, and resumed: the student's turn and the ratios of all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gentrain.training.run import save_config
from tests.distributed.cases import Job, difference, record_difference, records, run_of, state_of, train_all, values
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(480)]

RUNS: dict[str, dict[str, Any]] = {
    "sid": {"generator_loss": "sid"},
    # ratios are made of all ranks' samples; the student learns in steps 2, 4 and 6 of six
    "kl": {"generator_loss": "kl", "critic_weight": 0.1, "student_every": 2},
}
ZERO2 = {"name": "deepspeed", "zero_stage": 2}


def settings_of(root: Path, name: str, run: str, engine: Any) -> dict[str, Any]:
    method = {"name": "distribution_matching", "guidance": 1.5, **RUNS[run]}
    settings = values(root / f"{name}-{run}", method, engine, micro_batches=1)  # ratios have mean 1 over what is seen at once
    return settings | {"model": {"name": "dropout_mlp", "dropout": 0}, "roles": {"teacher": {"weights": str(root / "teacher")}}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """alone-*: one rank, torch. whole-*: two ranks, ZeRO-2. halves-*: the same, stopped after three of six steps and resumed."""
    root = tmp_path_factory.mktemp("runs")
    teacher = values(root / "teacher", "flow_matching", "torch") | {"model": {"name": "dropout_mlp", "dropout": 0}}
    save_config(run_of(teacher))
    run_ranks(1, train_all, [Job(teacher)] + [Job(settings_of(root, "alone", run, "torch")) for run in RUNS])
    jobs = [Job(settings_of(root, "whole", run, ZERO2)) for run in RUNS]
    jobs += [Job(settings_of(root, "halves", run, ZERO2), stop_at=stop_at) for run in RUNS for stop_at in (3, None)]
    run_ranks(2, train_all, jobs)
    return root


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_give_the_curve_of_one(root: Path, run: str) -> None:
    alone, whole = root / f"alone-{run}", root / f"whole-{run}"
    assert len(records(alone)) == 6
    assert record_difference(records(alone), records(whole)) <= 2e-6
    assert difference(state_of(alone), state_of(whole)) <= 2e-6


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(root: Path, run: str) -> None:
    whole, halves = root / f"whole-{run}", root / f"halves-{run}"
    assert records(whole) == records(halves)
    assert difference(state_of(whole), state_of(halves)) == 0


def test_the_student_keeps_its_turn_after_three_of_six_steps(root: Path) -> None:
    turns = [index + 1 for index, record in enumerate(records(root / "halves-kl")) if "loss/student" in record]
    assert turns == [2, 4, 6]
