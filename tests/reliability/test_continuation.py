"""A student, its average, a fake score and their optimisers come back: on as many ranks to the last bit, on others within rounding."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gentrain.training.beginning import refuse_wrong_start
from gentrain.training.run import CHECKPOINTS
from gentrain.training.storage import LocalStorage
from gentrain.training.world import World
from tests.distributed.cases import Job, difference, newest, record_difference, records, run_of, state_of
from tests.ranks import run_ranks
from tests.reliability.cases import HALF, STEPS, comes_back, stale_weights, three_roles, train_and_fail, train_and_tell

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

ALONE = World(0, 1, torch.device("cpu"))
ZERO3 = {"name": "deepspeed", "zero_stage": 3}
BF16 = ZERO3 | {"precision": "bf16"}
SHARDED: dict[str, dict[str, Any]] = {f"zero{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)}
SHARDED |= {f"{name}-bf16": engine | {"precision": "bf16"} for name, engine in SHARDED.items()}
TOLERANCE = 4e-6  # as tests/gates/test_reliability.py, which measures it


@dataclass
class Results:
    root: Path
    told: Mapping[str, list[tuple[tuple[str, str], dict[Any, Any]]]]  # run -> per rank


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """On one rank torch trains a whole run, and half of one that two ranks go on with; two ranks of ZeRO 3 do likewise."""
    root = tmp_path_factory.mktemp("runs")
    alone = train_and_tell(
        ALONE, {"whole": Job(three_roles(root / "whole", "torch")), "one": Job(three_roles(root / "two", "torch"), HALF)}
    )
    full = three_roles(root / "full", ZERO3)
    full["training"] |= {"checkpoint_every": 24}
    rounded = three_roles(root / "rounded", BF16)
    late = three_roles(root / "late", ZERO3)
    late["training"] |= {"checkpoint_every": 24, "async_checkpoints": True}
    jobs = {
        "whole2": Job(three_roles(root / "whole2", ZERO3)),
        "first": Job(three_roles(root / "halves", ZERO3), HALF, stop_rank=1),
        "second": Job(three_roles(root / "halves", ZERO3)),
        "half": Job(three_roles(root / "one", ZERO3), HALF),
        "two": Job(three_roles(root / "two", ZERO3)),
        "float": Job(three_roles(root / "rounded", ZERO3), HALF),
    }
    ranks = run_ranks(2, _all, jobs, {"full": Job(full), "late": Job(late)}, rounded)
    told = {name: [rank[name] for rank in ranks] for name in ranks[0]}
    told |= {name: [one] for name, one in alone.items()}
    told["rest"] = [train_and_tell(ALONE, {"rest": Job(three_roles(root / "one", "torch"))})["rest"]]
    return Results(root, told)


def _all(world: World, jobs: dict[str, Job], failing: dict[str, Job], rounded: dict[str, Any]) -> dict[str, Any]:
    """`rounded` goes on in bf16 from where a run in float32 has stopped."""
    stale = {name: stale_weights(world, engine) for name, engine in SHARDED.items()}
    told = train_and_tell(world, jobs) | train_and_fail(world, failing, rank=1)
    exact = [comes_back(world, rounded)]
    changed = refuse_wrong_start(run_of(rounded), []).settings
    told |= train_and_tell(world, {"rounded": Job(rounded)})
    exact.append(comes_back(world, three_roles(Path(rounded["output"]), {"name": "deepspeed", "zero_stage": 2})))
    return told | {"stale": stale, "precision": (exact, changed)}


def test_the_same_ranks_go_on_to_the_last_bit(results: Results) -> None:
    assert difference(state_of(results.root / "halves"), state_of(results.root / "whole2")) == 0
    assert records(results.root / "halves") == records(results.root / "whole2") and len(records(results.root / "halves")) == STEPS
    names = {name.partition("/")[0] for name in state_of(results.root / "halves")}
    assert names == {f"{role}.{kind}" for role in ("student", "fake_score") for kind in ("weights", "optimizer")} | {"student.ema"}


@pytest.mark.parametrize("engine", SHARDED)
def test_weights_that_did_not_follow_their_masters_are_refused(results: Results, engine: str) -> None:
    for said in results.told["stale"]:
        good, bad = said[engine]
        assert not good
        assert re.fullmatch(r"role 'model': the weights '\S+' that forward uses are not the ones that were restored", bad)


def test_another_precision_goes_on_from_the_same_masters_averages_and_optimisers(results: Results) -> None:
    """From float32 to bf16, and back at another stage: what is saved is float32 in both."""
    assert results.told["precision"] == [([True, True], {"engine.precision": ("fp32", "bf16")})] * 2
    assert [outcome for outcome, _ in results.told["rounded"]] == [("finished", "")] * 2
    seen: dict[Any, Any] = {}
    for part in ("float", "rounded"):
        for _, each in results.told[part]:
            seen |= each
    assert seen == results.told["whole"][0][1]  # no sample is left out, and none meets another noise


@pytest.mark.parametrize("run", ["one", "two"])
def test_another_number_of_ranks_goes_on_within_rounding(results: Results, run: str) -> None:
    """From ZeRO 3 on two ranks to torch on one, and back."""
    assert 0 < difference(state_of(results.root / run), state_of(results.root / "whole")) <= TOLERANCE
    assert record_difference(records(results.root / "whole"), records(results.root / run)) <= TOLERANCE


@pytest.mark.parametrize("parts", [("first", "second"), ("half", "rest"), ("one", "two")])
def test_samples_and_noise_are_those_of_the_run_that_never_stopped(results: Results, parts: tuple[str, str]) -> None:
    seen: dict[Any, Any] = {}
    for part in parts:
        for _, each in results.told[part]:
            assert not seen.keys() & each.keys()  # nothing is drawn twice
            seen |= each
    assert seen == results.told["whole"][0][1] and len(seen) == 2 * 12 * STEPS


def test_each_rank_writes_its_own_part_and_no_more(results: Results) -> None:
    def elements(run: str) -> list[int]:
        files = sorted(newest(results.root / run).glob("student.optimizer.*"))
        return [sum(len(value) for value in load_file(path).values()) - 1 for path in files]  # without the step count

    (whole,), shares = elements("whole"), elements("whole2")
    assert len(shares) == 2 and sum(shares) == whole and max(shares) < 0.55 * whole


@pytest.mark.parametrize("run", ["full", "late"])
def test_a_disk_that_is_full_on_one_rank_is_told_on_both_and_the_former_checkpoint_stays(results: Results, run: str) -> None:
    directory = results.root / run / CHECKPOINTS
    for (kind, message), _ in results.told[run]:
        assert kind == "OSError"
        assert message.startswith(f"no checkpoint could be written under {directory}: ")
        assert "No space left on device" in message and "the disk is full: free some space" in message and message.endswith("(rank 1)")
    assert sorted(path.name for path in directory.iterdir()) == [f"{24:012d}", "LATEST", "OWNER"]
    with LocalStorage(directory).open(f"{24:012d}") as checkpoint:
        checkpoint.verify()
