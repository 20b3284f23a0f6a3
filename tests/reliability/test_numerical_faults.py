"""What is not a number in one role on one rank, and losses that jump: what the ranks agree on, and what is left of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gentrain.training.checkpoint import STATE
from gentrain.training.logs import LOGS
from gentrain.training.run import CHECKPOINTS, METRICS
from gentrain.training.storage import LocalStorage
from gentrain.training.world import World
from tests.distributed.cases import Job, difference, newest, records, state_of
from tests.ranks import run_ranks
from tests.reliability.troubled import train_troubled, troubled

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

ALONE = World(0, 1, torch.device("cpu"))
ENGINES: dict[str, Any] = {"torch": "torch", "zero3": {"name": "deepspeed", "zero_stage": 3}}
ROLES = ("fake_score", "student")
GUARD = {"window": 8, "patience": 2, "max_rollbacks": 1}
LOST = {"role": "student", "start": 474, "end": 475, "added": float("nan")}  # in the last step, on one rank
LOSING = {"role": "student", "start": 180, "end": 228, "added": float("-inf")}
LOST_LINES = {192: (1, 0), 216: (0, 0), 240: (0, 1)}  # by samples: which of a line's two steps have a loss that is finite
SPIKE = {"role": "student", "start": 276, "end": 300, "factor": 1e4}  # steps 23 and 24: a checkpoint is due between


@dataclass
class Results:
    root: Path
    outcomes: dict[str, list[tuple[str, str]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    root = tmp_path_factory.mktemp("runs")
    two: dict[str, Job] = {}
    for name, engine in ENGINES.items():
        for role in ROLES:  # sample 26 is in the third step: one rank sees it
            nan = {"role": role, "start": 26, "end": 27, "factor": float("nan")}
            two[f"nan-{role}-{name}-2"] = Job(troubled(root / f"nan-{role}-{name}-2", engine, **nan))
        two[f"spike-{name}-2"] = Job(troubled(root / f"spike-{name}-2", engine, GUARD, **SPIKE))
    lost, unknown = troubled(root / "lost-2", "torch", **LOST), troubled(root / "unknown-2", "torch")
    lost["training"] |= {"keep_best": "loss/student", "keep_last": 1}
    unknown["training"] |= {"keep_best": "loss/studnet"}
    two |= {"lost-2": Job(lost), "unknown-2": Job(unknown)}
    outcomes = {name: list(each) for name, each in zip(two, zip(*run_ranks(2, train_troubled, list(two.values()))))}
    one: dict[str, Job] = {}
    for role in ROLES:
        nan = {"role": role, "start": 26, "end": 27, "factor": float("nan")}
        one[f"nan-{role}-torch-1"] = Job(troubled(root / f"nan-{role}-torch-1", "torch", **nan))
    one["spike-torch-1"] = Job(troubled(root / "spike-torch-1", "torch", GUARD, seen=str(root / "seen.jsonl"), **SPIKE))
    late = SPIKE | {"start": 468, "end": 480}  # the last step: no other can follow
    one["late"] = Job(troubled(root / "late", "torch", GUARD, **late))
    one["late-alone"] = Job(troubled(root / "late-alone", "torch", GUARD, **late))
    one["late-alone"].settings["training"] |= {"checkpoint_every": 1_000_000}
    one["again"] = Job(troubled(root / "again", "torch", GUARD, **(SPIKE | {"end": 480})))
    one["calm"] = Job(troubled(root / "calm", "torch", GUARD))
    one["plain"] = Job(troubled(root / "plain", "torch", None))
    one["lost-1"] = Job(troubled(root / "lost-1", "torch", None, **LOSING))
    one["lost-1"].settings["training"] |= {"log_every": 24}
    outcomes |= {name: [outcome] for name, outcome in zip(one, train_troubled(ALONE, list(one.values())))}
    return Results(root, outcomes)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("role", ROLES)
def test_what_is_not_a_number_on_one_rank_skips_that_step_of_that_role_on_both(results: Results, role: str, engine: str) -> None:
    run, reference = f"nan-{role}-{engine}-2", f"nan-{role}-torch-1"
    assert results.outcomes[run] == [("finished", "")] * 2
    other = ROLES[1 - ROLES.index(role)]
    for line in records(results.root / run):
        assert (line[f"skipped/{role}"], line[f"skipped/{other}"]) == (int(line["samples"] >= 36), 0)
        assert (f"grad_norm/{role}" in line, f"grad_norm/{other}" in line) == (line["samples"] != 36, True)
    state = state_of(results.root / run)
    steps = {key: int(value) for key, value in state.items() if key.endswith("optimizer/step")}
    assert steps == {f"{role}.optimizer/step": 39, f"{other}.optimizer/step": 40}
    assert difference(state_of(results.root / reference), state) <= 1e-5  # at most 7.7e-7 with torch and ZeRO 2 and 3


@pytest.mark.parametrize("run", ["spike-torch-1", *(f"spike-{name}-2" for name in ENGINES)])
def test_a_spike_takes_all_roles_averages_and_optimisers_back_and_goes_on_behind_its_data(results: Results, run: str) -> None:
    assert set(results.outcomes[run]) == {("finished", "")}
    lines = records(results.root / run)
    assert [line["rollbacks"] for line in lines] == [0] * 24 + [1] * 16
    assert [line["samples"] for line in lines] == list(range(12, 481, 12))
    names = LocalStorage(results.root / run / CHECKPOINTS).names()
    assert [int(name) for name in names] == [96, 192, 300, 384, 480]
    before, after = (state_of(results.root / run, f"{samples:012d}") for samples in (192, 300))
    assert any(".ema/" in key for key in after) and any("exp_avg" in key for key in after)
    assert difference(before, after) == 0
    assert (
        difference(state_of(results.root / "spike-torch-1"), state_of(results.root / run)) <= 1e-5
    )  # at most 2.7e-7 with torch and ZeRO 2 and 3


def test_no_sample_is_seen_twice_and_none_is_left_out(results: Results) -> None:
    seen = [index for line in (results.root / "seen.jsonl").read_text().splitlines() for index in json.loads(line)]
    assert seen == list(range(480))


def test_a_guard_changes_nothing_in_a_calm_run(results: Results) -> None:
    assert difference(state_of(results.root / "calm"), state_of(results.root / "plain")) == 0
    assert difference(state_of(results.root / "calm"), state_of(results.root / "spike-torch-1")) > 0.01


def test_spikes_that_go_on_end_the_run(results: Results) -> None:
    ((kind, message),) = results.outcomes["again"]
    assert kind == "Diverged"
    assert (
        "loss/student = " in message
        and "after 1 rollbacks (training.spike_guard.max_rollbacks)" in message
        and "lower optimizer.lr" in message
    )
    assert newest(results.root / "again").name == f"{300:012d}"  # the rollback's, not one of the spikes'


@pytest.mark.parametrize("stop_at", [5, 24, 25, 30])
def test_a_guarded_run_that_stops_comes_to_the_same_end(results: Results, tmp_path: Path, stop_at: int) -> None:
    """24: between the two spikes, where nothing is published; 25: after the rollback."""
    settings = troubled(tmp_path, "torch", GUARD, **SPIKE)
    assert train_troubled(ALONE, [Job(settings, stop_at)]) == [("stopped", "")]
    assert int(newest(tmp_path).name) == (192 if stop_at == 24 else 12 * stop_at)
    assert train_troubled(ALONE, [Job(settings)]) == [("finished", "")]
    assert difference(state_of(results.root / "spike-torch-1"), state_of(tmp_path)) == 0
    assert records(results.root / "spike-torch-1") == records(tmp_path)


def test_a_run_that_ends_amid_spikes_ends_with_its_last_good_weights(results: Results) -> None:
    assert results.outcomes["late"] == [("finished", "")]
    assert difference(state_of(results.root / "late", f"{384:012d}"), state_of(results.root / "late", f"{480:012d}")) == 0
    assert difference(state_of(results.root / "late", f"{384:012d}"), state_of(results.root / "calm", f"{384:012d}")) == 0
    # where nothing was published before, what there is is kept
    assert results.outcomes["late-alone"] == [("finished", "")] and newest(results.root / "late-alone").name == f"{480:012d}"
    assert difference(state_of(results.root / "late-alone"), state_of(results.root / "late")) > 0.01


def test_a_loss_that_is_not_a_number_with_a_sound_gradient_is_told_by_all_ranks_and_the_files_stay_json(results: Results) -> None:
    run = results.root / "lost-2"
    assert results.outcomes["lost-2"] == [("finished", "")] * 2

    def strictly(text: str) -> dict[str, Any]:
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    lines = [strictly(line) for line in (run / METRICS).read_text().splitlines()]
    assert [(line["samples"], line["not_finite/loss/student"]) for line in lines if "not_finite/loss/student" in line] == [(480, 0.5)]
    assert all(line["skipped/student"] == 0 and line["grad_norm/student"] > 0 and line["loss/fake_score"] > 0 for line in lines)
    for rank in range(2):
        said = (run / LOGS / f"rank-{rank}.jsonl").read_text()
        assert said.count("the loss of role student: not a finite number in steps up to sample 480") == 1 and "fake_score" not in said
    names = LocalStorage(run / CHECKPOINTS).names()
    best = min((line for line in lines[:-1] if line["samples"] % 96 == 0), key=lambda line: line["loss/student"])
    assert [int(name) for name in names] == sorted({best["samples"], 480})
    assert json.loads((newest(run) / STATE).read_text())["metrics"]["loss/student"] is None


def test_where_a_loss_is_not_a_number_the_mean_of_the_other_steps_is_told(results: Results) -> None:
    """Lines of two steps, beside lines of each step of a run without a fault."""
    each, lines = records(results.root / "plain"), records(results.root / "lost-1")
    assert [line["samples"] for line in lines] == list(range(24, 481, 24))
    for first, second, line in zip(each[::2], each[1::2], lines, strict=True):
        lost = line["samples"] in LOST_LINES
        told = [step["loss/student"] for step, left in zip((first, second), LOST_LINES.get(line["samples"], (1, 1))) if left]
        assert line["loss/student"] == (pytest.approx(sum(told) / len(told), rel=1e-6) if told else None)
        assert line.get("not_finite/loss/student", 0) == (1 - len(told) / 2) and ("not_finite/loss/student" in line) == lost
    metrics = json.loads((results.root / "lost-1" / CHECKPOINTS / f"{192:012d}" / STATE).read_text())["metrics"]
    assert metrics["loss/student"] is None and metrics["loss/fake_score"] > 0  # so that it is not the best one


def test_a_metric_to_keep_the_best_by_that_does_not_exist_is_said_at_the_first_line(results: Results) -> None:
    for kind, message in results.outcomes["unknown-2"]:
        assert kind == "ConfigError" and message.startswith(
            "training.keep_best: this run has no metric 'loss/studnet'; name one of these: "
        )
        assert "loss/student" in message and "grad_norm/fake_score" in message
    assert newest(results.root / "unknown-2").name == f"{12:012d}"
