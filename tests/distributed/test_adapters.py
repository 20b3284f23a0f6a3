"""Adapters, and parameters chosen by their names, on one shared network on two ranks: every engine gives the reference's curve, resumes bit
for bit and moves what learns alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.distributed.adapter_cases import adapted, partial, train_adapted
from tests.distributed.cases import ENGINES, Job, difference, record_difference, records, state_of
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(480)]

PARTS = ("", "partial-")  # begins the names of runs that learn adapters, and of those that learn some parameters
RESUMED = ("torch", "zero2", "zero3")
TOLERANCE = 1e-6  # as for whole networks, see test_engines
SEPARATE = {"teacher": {"placement": "offloaded"}, "reference": {"placement": "offloaded"}}  # copies of their own
BELOW = {role: {"placement": "sharded"} for role in ("teacher", "critic", "student", "reference")}


@dataclass
class Results:
    root: Path
    outcomes: dict[str, set[tuple[str, str]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    root = tmp_path_factory.mktemp("runs")
    jobs: dict[str, Job] = {}
    for name, engine in ENGINES.items():
        jobs[name] = Job(adapted(root / name, engine), trace=True)
        jobs[f"separate-{name}"] = Job(adapted(root / f"separate-{name}", engine) | {"roles": SEPARATE})
    for name in RESUMED:
        halves = adapted(root / f"halves-{name}", ENGINES[name])
        jobs |= {f"first-{name}": Job(halves, stop_at=3, stop_rank=1), f"second-{name}": Job(halves)}
    jobs["below"] = Job(adapted(root / "below", ENGINES["zero3"]) | {"roles": BELOW})
    for name in ("zero2", "zero3"):
        jobs[f"bf16-{name}"] = Job(adapted(root / f"bf16-{name}", {**ENGINES[name], "precision": "bf16"}))
    for name, engine in ENGINES.items():
        jobs[f"partial-{name}"] = Job(partial(root / f"partial-{name}", engine), trace=True)
        jobs[f"partial-separate-{name}"] = Job(partial(root / f"partial-separate-{name}", engine) | {"roles": SEPARATE})
    cut = {**ENGINES["zero3"], "settings": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    jobs["partial-cut"] = Job(partial(root / "partial-cut", cut))
    for name in RESUMED:
        halves = partial(root / f"partial-halves-{name}", ENGINES[name])
        jobs |= {f"first-partial-{name}": Job(halves, stop_at=3, stop_rank=1), f"second-partial-{name}": Job(halves)}
    for name in ("zero2", "zero3"):
        jobs[f"partial-bf16-{name}"] = Job(partial(root / f"partial-bf16-{name}", {**ENGINES[name], "precision": "bf16"}))
    outcomes = {run: set(each) for run, each in zip(jobs, zip(*run_ranks(2, train_adapted, list(jobs.values()))))}
    return Results(root, outcomes)


def test_all_runs_come_to_their_end(results: Results) -> None:
    wrong = {run: r for run, r in results.outcomes.items() if r != {("stopped" if run.startswith("first") else "finished", "")}}
    assert not wrong


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("part", PARTS)
def test_every_engine_gives_the_curve_and_the_state_of_the_reference(results: Results, part: str, engine: str) -> None:
    reference, run = results.root / f"{part}torch", results.root / f"{part}{engine}"
    assert len(records(run)) == 6
    assert record_difference(records(reference), records(run)) <= TOLERANCE
    assert difference(state_of(reference), state_of(run)) <= TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("part", PARTS)
def test_what_lies_below_is_a_copy_of_the_teacher_exactly(results: Results, part: str, engine: str) -> None:
    shared, separate = results.root / f"{part}{engine}", results.root / f"{part}separate-{engine}"
    assert records(shared) == records(separate)
    assert difference(state_of(shared), state_of(separate)) == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("part", PARTS)
def test_only_what_learns_is_saved_and_moves(results: Results, part: str, engine: str) -> None:
    state = state_of(results.root / f"{part}{engine}")
    names = {name.split("/", 1)[1] for name in state if name.startswith(("critic.weights", "student.weights"))}
    layers = ("input", "hidden.2", "hidden.4", "output")
    adapters = {f"adapter.{layer}.lora_{half}.weight" for layer in layers for half in "AB"}
    assert names == ({f"own.{layer}.{kind}" for layer in layers[1:] for kind in ("weight", "bias")} if part else adapters)
    trace = torch.load(results.root / f"{part}{engine}" / "trace.pt")
    assert not trace["leaked"]  # what lies below neither moved nor gathered gradients
    for role in ("critic", "student"):
        first, last = trace["weights"][0][role], trace["weights"][-1][role]
        assert all(not torch.equal(first[name], last[name]) for name in first)
    average = trace["ema"][-1]["student"]
    assert all(not torch.equal(average[name], trace["weights"][-1]["student"][name]) for name in average)


@pytest.mark.parametrize("engine", RESUMED)
@pytest.mark.parametrize("part", PARTS)
def test_six_steps_are_three_and_resume_and_three_bit_for_bit(results: Results, part: str, engine: str) -> None:
    whole, halves = results.root / f"{part}{engine}", results.root / f"{part}halves-{engine}"
    assert records(whole) == records(halves)
    assert difference(state_of(whole), state_of(halves)) == 0


@pytest.mark.parametrize("part", PARTS)
def test_in_bf16_stages_agree_and_stay_near_fp32(results: Results, part: str) -> None:
    fp32, two, three = (records(results.root / f"{part}{name}") for name in ("torch", "bf16-zero2", "bf16-zero3"))
    assert record_difference(two, three) <= TOLERANCE
    assert 1e-6 < max(abs(a["loss/student"] / b["loss/student"] - 1) for a, b in zip(fp32, two, strict=True)) < 0.05


@pytest.mark.parametrize(("reference", "run"), [("torch", "below"), ("partial-torch", "partial-cut")])
def test_what_is_gathered_for_each_layer_changes_nothing(results: Results, reference: str, run: str) -> None:
    """The network below shared out, and parameters in its layers that are (others of this size stay whole on every rank)."""
    one, other = results.root / reference, results.root / run
    assert record_difference(records(one), records(other)) <= TOLERANCE
    assert difference(state_of(one), state_of(other)) <= TOLERANCE
