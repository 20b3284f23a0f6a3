"""Optimisers on the host (ZeRO-Offload), on two ranks: curve and state of the reference, resume bit for bit, steps that are skipped.

On a CPU the host is where everything is; what moves between it and a GPU is not tried here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.adapter_cases import adapted, train_adapted
from tests.distributed.cases import Job, difference, record_difference, records, state_of, values
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

TOLERANCE = 1e-6  # as without, see test_engines
STAGES = (1, 2, 3)
NO_DROPOUT = {"model": {"name": "dropout_mlp", "dropout": 0}}
NAN = {"name": "relay", "nan_from": 26, "nan_until": 27}


def engine(stage: int, **more: Any) -> dict[str, Any]:
    return {"name": "deepspeed", "zero_stage": stage, "offload_optimizer": True, **more}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    jobs = {
        "torch": Job(values(root / "torch") | NO_DROPOUT), "nan-torch": Job(values(root / "nan-torch", NAN) | NO_DROPOUT),
        "adapted-torch": Job(adapted(root / "adapted-torch")),
    }  # fmt: skip
    for stage in STAGES:
        jobs[f"zero{stage}"] = Job(values(root / f"zero{stage}", engine=engine(stage)) | NO_DROPOUT)
        jobs[f"nan-zero{stage}"] = Job(values(root / f"nan-zero{stage}", NAN, engine(stage)) | NO_DROPOUT)
        halves = values(root / f"halves{stage}", engine=engine(stage)) | NO_DROPOUT
        jobs |= {f"first{stage}": Job(halves, stop_at=3, stop_rank=1), f"second{stage}": Job(halves)}
        for name, offload in (("bf16", True), ("bf16-here", False)):
            settings = engine(stage, precision="bf16") | {"offload_optimizer": offload}
            jobs[f"{name}{stage}"] = Job(values(root / f"{name}{stage}", "flow_matching", settings) | NO_DROPOUT)
    branched = {"model": "branches"}
    jobs["branched-torch"] = Job(values(root / "branched-torch", "branched") | branched)
    for stage in STAGES:
        jobs[f"branched-zero{stage}"] = Job(values(root / f"branched-zero{stage}", "branched", engine(stage)) | branched)
        here = engine(stage) | {"offload_optimizer": False}
        jobs[f"branched-here{stage}"] = Job(values(root / f"branched-here{stage}", "branched", here) | branched)
    jobs["adapted-zero2"] = Job(adapted(root / "adapted-zero2", engine(2)))
    outcomes = {run: set(each) for run, each in zip(jobs, zip(*run_ranks(2, train_adapted, list(jobs.values()))))}
    lost = {run: outcomes.pop(run) for run in ("branched-zero2", "branched-zero3")}
    assert outcomes == {run: {("stopped" if run.startswith("first") else "finished", "")} for run in jobs if run not in lost}
    for (kind, message), *others in lost.values():  # the same on both ranks
        assert kind == "EngineMisuse" and "DeepSpeed then drops its gradient" in message and not others
    return root


@pytest.mark.parametrize("reference, run", [("torch", f"zero{s}") for s in STAGES] + [("adapted-torch", "adapted-zero2")])
def test_steps_on_the_host_are_those_of_the_reference(root: Path, reference: str, run: str) -> None:
    assert record_difference(records(root / reference), records(root / run)) <= TOLERANCE
    assert difference(state_of(root / reference), state_of(root / run)) <= TOLERANCE


@pytest.mark.parametrize("name", ["here1", "here2", "here3", "zero1"])
def test_weights_that_the_last_loss_does_not_reach_move_by_the_first(root: Path, name: str) -> None:
    """On the host at stages 2 and 3 DeepSpeed would drop the first one's gradient; the engine refuses."""
    reference, run = root / "branched-torch", root / f"branched-{name}"
    assert record_difference(records(reference), records(run)) <= TOLERANCE
    assert difference(state_of(reference), state_of(run)) <= TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
def test_six_steps_are_three_and_resume_and_three_bit_for_bit(root: Path, stage: int) -> None:
    assert records(root / f"zero{stage}") == records(root / f"halves{stage}")
    assert difference(state_of(root / f"zero{stage}"), state_of(root / f"halves{stage}")) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_skips_the_step_on_both_ranks(root: Path, stage: int) -> None:
    assert [line["skipped/critic"] for line in records(root / f"nan-zero{stage}")] == [0, 0, 1, 1, 1, 1]
    assert difference(state_of(root / "nan-torch"), state_of(root / f"nan-zero{stage}")) <= TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_what_it_is_without(root: Path, stage: int) -> None:
    assert record_difference(records(root / f"bf16-here{stage}"), records(root / f"bf16{stage}")) <= TOLERANCE
