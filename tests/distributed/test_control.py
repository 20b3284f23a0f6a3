"""A control learnt on two ranks, and resumed: the branch alone is trained and kept, beside a fake score and a multiplier of its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gentrain.training.roles import load_network
from gentrain.training.run import save_config
from tests.distributed.cases import Job, records, run_of, state_of, values
from tests.distributed.three_ways import (
    assert_a_resumed_run_is_the_uninterrupted_one,
    assert_two_ranks_give_the_curve_of_one,
    train_three_ways,
)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(480)]

MLP = {"name": "mlp", "width": 24, "depth": 2}
RUNS: dict[str, dict[str, Any]] = {
    "jdm": {"generator_loss": "sid", "control": {"name": "signs"}, "student_every": 2},
    "noise_consistency": {"control": {"name": "signs"}, "levels": 3},
}
TEACHERS = {"jdm": "teacher", "noise_consistency": "one_step"}


def settings_of(root: Path, name: str, run: str, engine: Any) -> dict[str, Any]:
    settings = values(root / f"{name}-{run}", {"name": run, **RUNS[run]}, engine)
    return settings | {"model": MLP, "roles": {"teacher": {"weights": str(root / TEACHERS[run])}}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    teacher = values(root / "teacher", "flow_matching", "torch") | {"model": MLP}
    one_step = values(root / "one_step", "distribution_matching", "torch") | {"model": MLP}
    one_step["roles"] = {"teacher": {"weights": str(root / "teacher")}}
    for settings in (teacher, one_step):
        save_config(run_of(settings))
    train_three_ways(partial(settings_of, root), RUNS, [Job(teacher), Job(one_step)])
    return root


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_give_the_curve_of_one(root: Path, run: str) -> None:
    assert_two_ranks_give_the_curve_of_one(root, run, 1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(root: Path, run: str) -> None:
    assert_a_resumed_run_is_the_uninterrupted_one(root, run)


def test_the_student_keeps_its_turn_after_three_of_six_steps(root: Path) -> None:
    turns = [index + 1 for index, record in enumerate(records(root / "halves-jdm")) if "loss/student" in record]
    assert turns == [2, 4, 6]


def test_of_the_student_the_branch_alone_is_kept(root: Path) -> None:
    kept = [name for name in state_of(root / "whole-jdm") if name.startswith("student.weights/")]
    assert kept and all(name.startswith("student.weights/own.control.") for name in kept)


@pytest.mark.parametrize("run", RUNS)
def test_what_was_learnt_steers_the_teachers_network(root: Path, run: str) -> None:
    """Loaded for sampling: without a control the teacher, with one something else."""
    save_config(run_of(settings_of(root, "whole", run, "torch")))
    student, _ = load_network(root / f"whole-{run}")
    teacher, _ = load_network(root / TEACHERS[run])
    x, t, label = torch.randn(4, 2), torch.rand(4), {"label": torch.arange(4) % 3}
    torch.testing.assert_close(student.x0(x, t, label), teacher.x0(x, t, label), rtol=0, atol=0)
    steered = student.x0(x, t, {**label, "control": torch.ones(4, 2)})
    assert (steered - teacher.x0(x, t, label)).abs().amax(1).min() > 1e-5
