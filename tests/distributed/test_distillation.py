"""Distillation on two ranks, and resumed: the student's turn, the ratios of all ranks, calls before the last, heads on other networks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gentrain.training.run import save_config
from tests.distributed.cases import Job, records, run_of, values
from tests.distributed.three_ways import (
    assert_a_resumed_run_is_the_uninterrupted_one,
    assert_two_ranks_give_the_curve_of_one,
    train_three_ways,
)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(480)]

HEADS = {"layers": "hidden$", "width": 5}
RUNS: dict[str, dict[str, Any]] = {
    "sid": {"generator_loss": "sid"},
    # ratios are made of all ranks' samples; the student learns in steps 2, 4 and 6 of six
    "kl": {"generator_loss": "kl", "critic_weight": 0.1, "student_every": 2},
    "steps": {"generator_loss": "dmd", "steps": 3, "critic_weight": 0.1, "critic_heads": HEADS | {"of": "fake_score"}},
    "ladd": {"generator_loss": "ladd", "guidance": 1, "critic_weight": 1, "critic_heads": HEADS, "critic_times": "uniform"},
}


def settings_of(root: Path, name: str, run: str, engine: Any) -> dict[str, Any]:
    method = {"name": "distribution_matching", "guidance": 1.5, **RUNS[run]}
    settings = values(root / f"{name}-{run}", method, engine, micro_batches=1)  # ratios have mean 1 over what is seen at once
    return settings | {"model": {"name": "dropout_mlp", "dropout": 0}, "roles": {"teacher": {"weights": str(root / "teacher")}}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    teacher = values(root / "teacher", "flow_matching", "torch") | {"model": {"name": "dropout_mlp", "dropout": 0}}
    save_config(run_of(teacher))
    train_three_ways(partial(settings_of, root), RUNS, [Job(teacher)])
    return root


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_give_the_curve_of_one(root: Path, run: str) -> None:
    assert_two_ranks_give_the_curve_of_one(root, run, 2e-6)


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(root: Path, run: str) -> None:
    assert_a_resumed_run_is_the_uninterrupted_one(root, run)


def test_the_student_keeps_its_turn_after_three_of_six_steps(root: Path) -> None:
    turns = [index + 1 for index, record in enumerate(records(root / "halves-kl")) if "loss/student" in record]
    assert turns == [2, 4, 6]
