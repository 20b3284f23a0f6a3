"""Methods that follow a reward: every engine gives the curve of one rank, and a resumed run the uninterrupted one, with whole networks
and with adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import pytest

from tests.distributed import test_alignment as rollouts
from tests.distributed import test_rewards as distilled
from tests.distributed.cases import ENGINES, Job, difference, records, runs_apart, state_of, train_all
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gate, pytest.mark.distributed, pytest.mark.timeout(1800)]

Record = Callable[[str, object], None]
ADAPTER = {"adapter": {"rank": 2, "targets": ["linear"]}}
Run = tuple[Any, str, dict[str, Any]]  # the file of tests whose `settings` it has, its kind there, what is added
RUNS: list[Run] = [
    *((rollouts, method, {}) for method in rollouts.METHODS),
    (rollouts, "rocm", ADAPTER),
    *((distilled, kind, {}) for kind in distilled.KINDS),
    *((distilled, kind, ADAPTER) for kind in ("direct", "proxy")),
]


def job(root: FilePath, run: Run, engine: str, ranks: int, stop_at: int | None = None, name: str = "whole") -> Job:
    module, kind, more = run
    place = f"{name}-{engine}-{ranks}-{'adapter' if more else 'all'}"
    return Job(module.settings(root, place, kind, ENGINES[engine]) | more, stop_at=stop_at)


def place(job: Job) -> FilePath:
    return FilePath(job.settings["output"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> FilePath:
    """What the runs begin from, and every run on one rank with the reference engine."""
    root = tmp_path_factory.mktemp("runs")
    run_ranks(1, train_all, [*rollouts.begin(root), *distilled.begin(root), *(job(root, run, "torch", 1) for run in RUNS)])
    return root


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_give_the_curve_of_one_and_resume(root: FilePath, engine: str, record_property: Record) -> None:
    whole = [job(root, run, engine, 2) for run in RUNS]
    halves = [job(root, run, engine, 2, stop_at, "halves") for run in RUNS for stop_at in (3, None)]
    ended = [("finished", "")] * len(RUNS) + [("stopped", ""), ("finished", "")] * len(RUNS)
    assert run_ranks(2, train_all, [*whole, *halves]) == [ended] * 2
    for run, other, resumed in zip(RUNS, map(place, whole), map(place, halves[1::2]), strict=True):
        reference = place(job(root, run, "torch", 1))
        apart = runs_apart(reference, other)
        record_property(f"largest relative difference, {other.name}", apart)
        assert len(records(reference)) == 6 and apart <= rollouts.TOLERANCE, other.name
        assert records(resumed) == records(other) and difference(state_of(resumed), state_of(other)) == 0, resumed.name
