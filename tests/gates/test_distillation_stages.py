"""Distillation on two ranks: every ZeRO stage trains the student, the fake score and the critic of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.cases import ENGINES, Job, records, run_of, runs_apart, train_all, values
from tests.distributed.test_distillation import RUNS, settings_of
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gate, pytest.mark.distributed, pytest.mark.timeout(1800)]

Record = Callable[[str, object], None]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher, and every run on one rank with the reference engine."""
    from gentrain.training.run import save_config

    root = tmp_path_factory.mktemp("runs")
    teacher = values(root / "teacher", "flow_matching", "torch") | {"model": {"name": "dropout_mlp", "dropout": 0}}
    save_config(run_of(teacher))
    run_ranks(1, train_all, [Job(teacher), *(Job(settings_of(root, "torch-1", run, "torch")) for run in RUNS)])
    return root


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_give_the_curve_of_one(root: Path, engine: str, record_property: Record) -> None:
    outcomes = run_ranks(2, train_all, [Job(settings_of(root, f"{engine}-2", run, ENGINES[engine])) for run in RUNS])
    assert outcomes == [[("finished", "")] * len(RUNS)] * 2
    for run in RUNS:
        reference, other = root / f"torch-1-{run}", root / f"{engine}-2-{run}"
        apart = runs_apart(reference, other)
        record_property(f"largest relative difference, {run}", apart)
        assert apart <= TOLERANCE, run


@pytest.mark.parametrize("stage", range(4))
def test_a_run_is_resumed_at_another_stage_with_the_students_turn(root: Path, stage: int) -> None:
    """Three of six steps at one stage, the rest at the next: the student learns in steps 2, 4 and 6, and its state is that of one rank."""
    first, then = ({"name": "deepspeed", "zero_stage": each % 4} for each in (stage, stage + 1))
    settings = settings_of(root, f"from-{stage}", "kl", first)
    jobs = [Job(settings, stop_at=3), Job(settings | {"engine": settings["engine"] | then})]
    assert run_ranks(2, train_all, jobs) == [[("stopped", ""), ("finished", "")]] * 2
    found = records(root / f"from-{stage}-kl")
    assert [index + 1 for index, record in enumerate(found) if "loss/student" in record] == [2, 4, 6]
    assert runs_apart(root / "torch-1-kl", root / f"from-{stage}-kl") <= TOLERANCE
