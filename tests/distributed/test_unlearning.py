"""Methods that forget, on two ranks, and resumed in the middle of their alternation of roles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gentrain.training.run import save_config
from tests.distributed.cases import Job, difference, record_difference, records, run_of, state_of, train_all, values
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(480)]

METHODS: dict[str, dict[str, Any]] = {
    "sfd": {"name": "sfd", "forget": 1, "override": 2, "lam": 0.5, "mu": 0.5},
    "esd": {"name": "esd", "forget": 1},
    "npo": {"name": "npo", "forget": 1},
    "gradient_ascent": {"name": "gradient_ascent", "forget": 1},
}
STARTS = {"sfd": "teacher", "esd": "original", "npo": "original", "gradient_ascent": "model"}  # the role that takes the teacher's weights
ZERO2 = {"name": "deepspeed", "zero_stage": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher: what is unlearned. alone-*: one rank, torch. whole-*: two ranks, ZeRO-2. halves-*: the same, stopped after three of six
    steps and resumed."""
    root = tmp_path_factory.mktemp("runs")
    model = {"model": {"name": "dropout_mlp", "dropout": 0}}

    def settings(name: str, method: str, engine: Any) -> dict[str, Any]:
        given = values(root / f"{name}-{method}", METHODS[method], engine) | model
        return given | {"roles": {STARTS[method]: {"weights": str(root / "teacher")}}}

    teacher = values(root / "teacher", "flow_matching") | model
    save_config(run_of(teacher))  # what a run's weights are read by
    done = run_ranks(1, train_all, [Job(teacher), *(Job(settings("alone", method, "torch"), trace=True) for method in METHODS)])
    assert done[0] == [("finished", "")] * (1 + len(METHODS))
    jobs = [Job(settings("whole", method, ZERO2)) for method in METHODS]
    jobs += [Job(settings("halves", method, ZERO2), stop_at=stop_at) for method in METHODS for stop_at in (3, None)]
    run_ranks(2, train_all, jobs)
    return root


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_give_the_curve_of_one(root: Path, method: str) -> None:
    alone, whole = root / f"alone-{method}", root / f"whole-{method}"
    assert len(records(alone)) == 6
    assert record_difference(records(alone), records(whole)) <= 1e-5
    assert difference(state_of(alone), state_of(whole)) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(root: Path, method: str) -> None:
    whole, halves = root / f"whole-{method}", root / f"halves-{method}"
    assert records(whole) == records(halves)
    assert difference(state_of(whole), state_of(halves)) == 0


def test_only_the_roles_that_learn_move(root: Path) -> None:
    """Bit for bit, in a whole run: the teacher stays, the two others leave it."""
    import torch

    trace = torch.load(root / "alone-sfd" / "trace.pt")
    assert not trace["leaked"]
    for role in ("fake_score", "student"):
        assert difference(trace["weights"][0][role], trace["weights"][-1][role]) > 1e-3
    assert difference(trace["weights"][0]["fake_score"], trace["weights"][0]["student"]) == 0
