"""Forgetting on two ranks: every ZeRO stage trains the roles of one process, and a run of `sfd` goes on at another stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.cases import ENGINES, Job, runs_apart, train_all
from tests.distributed.test_unlearning import METHODS, prepare, settings_of
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gate, pytest.mark.distributed, pytest.mark.timeout(1800)]

Record = Callable[[str, object], None]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher, and every method on one rank with the reference engine."""
    root = tmp_path_factory.mktemp("runs")
    jobs = [prepare(root), *(Job(settings_of(root, "torch-1", method, "torch")) for method in METHODS)]
    assert run_ranks(1, train_all, jobs) == [[("finished", "")] * len(jobs)]
    return root


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_give_the_curve_of_one(root: Path, engine: str, record_property: Record) -> None:
    """Which weights learn is not kept by ZeRO 3, so saliency_unlearn is refused there."""
    methods = [method for method in METHODS if (engine, method) != ("zero3", "saliency_unlearn")]
    outcomes = run_ranks(2, train_all, [Job(settings_of(root, f"{engine}-2", method, ENGINES[engine])) for method in methods])
    assert outcomes == [[("finished", "")] * len(methods)] * 2
    for method in methods:
        reference, other = root / f"torch-1-{method}", root / f"{engine}-2-{method}"
        apart = runs_apart(reference, other)
        record_property(f"largest relative difference, {method}", apart)
        assert apart <= TOLERANCE, method


@pytest.mark.parametrize("stage", range(4))
def test_an_alternation_is_resumed_at_another_stage(root: Path, stage: int) -> None:
    """Three of six steps of both roles at one stage, the rest at the next: what one rank trains without a stop."""
    first, then = ({"name": "deepspeed", "zero_stage": each % 4} for each in (stage, stage + 1))
    settings = settings_of(root, f"from-{stage}", "sfd", first)
    jobs = [Job(settings, stop_at=3), Job(settings | {"engine": settings["engine"] | then})]
    assert run_ranks(2, train_all, jobs) == [[("stopped", ""), ("finished", "")]] * 2
    assert runs_apart(root / "torch-1-sfd", root / f"from-{stage}-sfd") <= TOLERANCE
