"""Every engine on one and on two ranks: the same curves, resume bit for bit, one verdict on steps that are not finite, averages that move.

Starting processes dominates, so that all runs happen in two process groups; the tests look at the directories they leave.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gentrain.training.run import CHECKPOINTS, METRICS
from tests.distributed.cases import ENGINES, Job, difference, record_difference, records, state_of, train_all, train_and_misuse, values
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(480)]

SHARDED = ("zero1", "zero2", "zero3")
# Largest relative difference in fp32 after 6 steps, of weights, averages, moments, losses and gradient norms: see docs/engine.md.
TOLERANCE = 1e-6
LONG = {"samples": 240}  # 20 steps
NO_DROPOUT = {"model": {"name": "dropout_mlp", "dropout": 0}}  # which draws by rank


@dataclass
class Results:
    root: Path
    outcomes: dict[str, list[tuple[str, str]]]  # run -> what it came to, one per rank
    misuses: dict[str, dict[str, str]]  # engine -> misuse -> what it said


def _parity_jobs(root: Path, ranks: int) -> dict[str, Job]:
    jobs = {}
    for name, engine in ENGINES.items():
        for method in ("relay", "flow_matching"):
            run = f"{method}-{name}-{ranks}"
            jobs[run] = Job(values(root / run, method, engine) | NO_DROPOUT, trace=method == "relay")
    return jobs


def _resume_jobs(root: Path, ranks: int, names: tuple[str, ...]) -> dict[str, Job]:
    jobs = {}
    for name in names:
        run = f"whole-{name}-{ranks}"
        jobs[run] = Job(values(root / run, "relay", ENGINES[name], **LONG))
        run = f"halves-{name}-{ranks}"
        jobs[f"first-{run}"] = Job(values(root / run, "relay", ENGINES[name], **LONG), stop_at=10, stop_rank=ranks - 1)
        jobs[f"second-{run}"] = Job(values(root / run, "relay", ENGINES[name], **LONG))
    return jobs


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    root = tmp_path_factory.mktemp("runs")
    two = _parity_jobs(root, 2) | _resume_jobs(root, 2, ("torch", "zero2", "zero3"))
    for name, engine in ENGINES.items():
        poisoned = {"name": "relay", "nan_from": 26, "nan_until": 27}  # one sample of the third step: one rank sees it
        two[f"nan-{name}"] = Job(values(root / f"nan-{name}", poisoned, engine))
    for name in ("torch", "zero0", "zero2", "zero3"):
        poisoned = {"name": "relay", "nan_from": 24, "nan_until": 1000}
        two[f"diverged-{name}"] = Job(values(root / f"diverged-{name}", poisoned, ENGINES[name], max_skipped=2, checkpoint_every=24))
    for place in ("sharded", "offloaded"):
        settings = values(root / place, "relay", "torch") | NO_DROPOUT
        two[place] = Job(settings | {"roles": {"teacher": {"placement": place}, "reference": {"placement": place}}})
    two["elsewhere"] = Job(values(root / "elsewhere", "relay", ENGINES["zero3"], **LONG) | NO_DROPOUT, stop_at=10)
    outcomes = {run: list(each) for run, each in zip(two, zip(*run_ranks(2, train_all, list(two.values()))))}

    one = _parity_jobs(root, 1) | _resume_jobs(root, 1, tuple(ENGINES))
    for name, engine in ENGINES.items():
        idle = {"name": "relay", "train_critic": False}
        unclipped = {"name": engine} if isinstance(engine, str) else engine
        one[f"idle-{name}"] = Job(values(root / f"idle-{name}", idle, engine), trace=True)
        one[f"unclipped-{name}"] = Job(values(root / f"unclipped-{name}", "relay", {**unclipped, "gradient_clipping": None}))
    for name, engine in ({"fp32": "torch"} | {name: {**ENGINES[name], "precision": "bf16"} for name in SHARDED}).items():
        settings = values(root / f"bf16-{name}", "flow_matching", engine, samples=4800, batch_size=120, ema_half_life=300)
        one[f"bf16-{name}"] = Job(settings, trace=True)
    for run in ("elsewhere", "stayed"):
        one[run] = Job(values(root / run, "relay", "torch", **LONG) | NO_DROPOUT)
    alone, misuses = run_ranks(1, train_and_misuse, list(one.values()), ENGINES)[0]
    outcomes |= {run: [outcome] for run, outcome in zip(one, alone)}
    return Results(root, outcomes, misuses)


def test_all_runs_come_to_their_end(results: Results) -> None:
    expected = {"first": "stopped", "diverged": "Diverged"}
    wrong = {run: r for run, r in results.outcomes.items() if {kind for kind, _ in r} != {expected.get(run.split("-")[0], "finished")}}
    assert not wrong


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["relay", "flow_matching"])
def test_every_engine_gives_the_curve_and_the_state_of_the_reference(results: Results, method: str, engine: str, ranks: int) -> None:
    reference, run = results.root / f"{method}-torch-1", results.root / f"{method}-{engine}-{ranks}"
    assert len(records(run)) == 6
    assert record_difference(records(reference), records(run)) <= TOLERANCE
    assert difference(state_of(reference), state_of(run)) <= TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_without_clipping_engines_agree_too(results: Results, engine: str) -> None:
    """DeepSpeed clips at 1.0 unless told otherwise."""
    reference, run = results.root / "unclipped-torch", results.root / f"unclipped-{engine}"
    assert max(line["grad_norm/critic"] for line in records(run)) > 1
    assert record_difference(records(reference), records(run)) <= TOLERANCE
    assert difference(state_of(reference), state_of(run)) <= TOLERANCE


@pytest.mark.parametrize("ranks, engine", [*((1, name) for name in ENGINES), (2, "torch"), (2, "zero2"), (2, "zero3")])
def test_twenty_steps_are_ten_and_resume_and_ten_bit_for_bit(results: Results, ranks: int, engine: str) -> None:
    whole, halves = results.root / f"whole-{engine}-{ranks}", results.root / f"halves-{engine}-{ranks}"
    assert records(whole) == records(halves) and len(records(whole)) == 20
    assert difference(state_of(whole), state_of(halves)) == 0


@pytest.mark.parametrize("engine", ["torch", "zero2", "zero3"])
def test_a_stop_asked_of_one_rank_stops_both_at_one_sample(results: Results, engine: str) -> None:
    assert results.outcomes[f"first-halves-{engine}-2"] == [("stopped", "")] * 2
    assert (results.root / f"halves-{engine}-2" / CHECKPOINTS / f"{120:012d}").is_dir()


def test_a_run_goes_on_at_another_stage_and_size(results: Results) -> None:
    stayed, moved = results.root / "stayed", results.root / "elsewhere"
    assert difference(state_of(stayed), state_of(moved)) <= 10 * TOLERANCE
    assert record_difference(records(stayed), records(moved)) <= 10 * TOLERANCE


@pytest.mark.parametrize("run", [f"relay-{name}-{ranks}" for name in ENGINES for ranks in (1, 2)] + [f"bf16-{name}" for name in SHARDED])
def test_the_average_is_that_of_a_gathered_float64_reference(results: Results, run: str) -> None:
    trace = torch.load(results.root / run / "trace.pt")
    for role in trace["ema"][0]:
        for name, start in trace["weights"][0][role].items():
            if not start.is_floating_point():
                continue
            average, decay = start.double(), 0.5 ** (12 / 30)
            torch.testing.assert_close(trace["ema"][0][role][name], start, rtol=0, atol=0)  # from the masters, under bf16 too
            for weights, ema in zip(trace["weights"][1:], trace["ema"][1:], strict=True):
                average = decay * average + (1 - decay) * weights[role][name].double()
                torch.testing.assert_close(ema[role][name].double(), average, rtol=1e-6, atol=1e-6)
        first, last = trace["ema"][0][role]["output.weight"], trace["ema"][-1][role]["output.weight"]
        assert (first - last).abs().max() > 1e-3
        assert (trace["weights"][-1][role]["output.weight"] - last).abs().max() > 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_only_the_stepped_role_changes_or_holds_gradients(results: Results, engine: str) -> None:
    trace = torch.load(results.root / f"idle-{engine}" / "trace.pt")
    assert not trace["leaked"]
    for weights in trace["weights"][1:]:
        assert all(torch.equal(value, trace["weights"][0]["critic"][name]) for name, value in weights["critic"].items())
        assert not torch.equal(weights["student"]["output.weight"], trace["weights"][0]["student"]["output.weight"])
    assert not torch.load(results.root / f"relay-{engine}-2" / "trace.pt")["leaked"]


@pytest.mark.parametrize("place", ["sharded", "offloaded"])
def test_where_frozen_weights_live_changes_nothing(results: Results, place: str) -> None:
    reference, run = results.root / "relay-torch-2", results.root / place
    assert record_difference(records(reference), records(run)) <= TOLERANCE
    assert difference(state_of(reference), state_of(run)) <= TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_is_not_finite_on_one_rank_skips_that_step_on_both(results: Results, engine: str) -> None:
    reference, run = results.root / "nan-torch", results.root / f"nan-{engine}"
    assert [line["skipped/critic"] for line in records(run)] == [0, 0, 1, 1, 1, 1]
    assert [line["skipped/student"] for line in records(run)] == [0] * 6
    assert ["grad_norm/critic" in line for line in records(run)] == [True, True, False, True, True, True]
    assert difference(state_of(reference), state_of(run)) <= 10 * TOLERANCE
    steps = {name: v.item() for name, v in state_of(run).items() if name.split("/")[-1] == "step"}
    assert steps == {"critic.optimizer/step": 5, "student.optimizer/step": 6}


@pytest.mark.parametrize("engine", ["torch", "zero0", "zero2", "zero3"])
def test_too_many_skipped_steps_in_a_row_end_the_run_at_its_last_checkpoint(results: Results, engine: str) -> None:
    root = results.root / f"diverged-{engine}"
    for kind, message in results.outcomes[f"diverged-{engine}"]:
        assert kind == "Diverged"
        assert "'critic'" in message and "3 steps in a row" in message and "optimizer.lr" in message
        assert str(root / CHECKPOINTS / f"{48:012d}") in message
    assert len((root / METRICS).read_text().splitlines()) == 4
    assert all(value.isfinite().all() for value in state_of(root).values())


@pytest.mark.parametrize("engine", SHARDED)
def test_bf16_learns_and_its_stages_agree(results: Results, engine: str) -> None:
    fp32, stage1, run = (records(results.root / f"bf16-{name}") for name in ("fp32", "zero1", engine))
    losses = [line["loss/model"] for line in run]
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])  # 0.86 to 0.96 over five seeds
    from_fp32 = max(abs(line["loss/model"] / loss - 1) for line, loss in zip(fp32, losses, strict=True))
    assert 1e-6 < from_fp32 < 3e-3  # at most 9e-4 over five seeds
    assert record_difference(stage1, run) <= TOLERANCE  # 1.2e-7 over five seeds


@pytest.mark.parametrize("engine", ENGINES)
def test_what_would_train_something_else_raises(results: Results, engine: str) -> None:
    """Each of these passes silently, and wrongly, through DeepSpeed at some stage."""
    said = results.misuses[engine]
    assert all("'model'" in message for name, message in said.items() if name != "_replaced_linear")
    assert "does not depend on its weights" in said["_no_gradient"]
    for misuse in ("_two_backwards", "_backwards_out_of_order", "_no_forward"):
        assert "without a new forward" in said[misuse]
    assert "after its last one" in said["_after_the_last"]
    assert "without a last backward" in said["_step_too_early"]
    assert "keeps no average" in said["_no_average"]
    assert said["_replaced_linear"] == "kept"  # DeepSpeed's own at stage 3 breaks jvp of every network in the process
