"""Rounds of DDO on two ranks: the pool's rows and what is drawn on the fly are those of one rank; a round goes on in its middle."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from gentrain.recipes.generate import Generate
from gentrain.training.run import save_config
from tests.distributed.cases import Job, records, run_of, state_of, train_all, values
from tests.distributed.three_ways import (
    assert_a_resumed_run_is_the_uninterrupted_one,
    assert_two_ranks_give_the_curve_of_one,
    train_three_ways,
)
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(480)]

ALPHA = 2.0
ROUNDS: dict[str, dict[str, Any]] = {"pool": {}, "on_the_fly": {"sampler": {"name": "heun", "steps": 3}}}
KINDS = (*ROUNDS, "dpo", "lora")  # the last is of the pool, with an adapter: its reference is the network with that turned off


def prepare(root: Path) -> None:
    """base: the run that is the reference. fakes: what it draws. pairs.safetensors: preferences."""
    base = values(root / "base", "flow_matching")
    save_config(run_of(base))
    run_ranks(1, train_all, [Job(base)])
    Generate(str(root / "base"), count=50, seed=1).execute(root / "fakes")
    drawn = load_file(root / "fakes" / "samples.safetensors")
    pairs = {"preferred": drawn["x"], "rejected": drawn["x"].flip(0), "label": drawn["label"]}
    save_file(pairs, root / "pairs.safetensors")


def settings_of(root: Path, name: str, kind: str, engine: Any) -> dict[str, Any]:
    """The network has dropout, of which the method must make no use."""
    pool = "on_the_fly" if kind == "on_the_fly" else str(root / "fakes")
    method: dict[str, Any] = {"name": "ddo", "pool": pool, "alpha": ALPHA, "beta": 5.0, **ROUNDS.get(kind, {})}
    method = {"name": "diffusion_dpo"} if kind == "dpo" else method
    settings = values(root / f"{name}-{kind}", {**method, "label_dropout": 0.2}, engine)
    if kind == "dpo":
        settings["data"] = {"name": "preferences", "file": str(root / "pairs.safetensors"), "classes": ["a", "b", "c"], "held_out": 5}
    if kind == "lora":
        settings["adapter"] = {"rank": 3, "alpha": 6.0, "targets": ["linear"]}
    return settings | {"roles": {"reference": {"weights": str(root / "base")}}, "model": {"name": "dropout_mlp", "dropout": 0.5}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    prepare(root)
    shutil.copytree(root / "fakes", root / "foreign")
    info = json.loads((root / "foreign" / "info.json").read_text())
    (root / "foreign" / "info.json").write_text(json.dumps(info | {"weights": "0" * 64}))
    refused, guarded = (settings_of(root, name, "pool", "torch") for name in ("refused", "guarded"))
    refused["method"]["pool"] = str(root / "foreign")
    guarded["method"] |= {"alpha": 50.0, "beta": 0.5}  # the divergence that the specification documents (D8), made quick by a large step
    guarded["optimizer"] = {"name": "adamw", "lr": 1.0}
    outcomes = train_three_ways(partial(settings_of, root), KINDS, [Job(refused), Job(guarded)])
    (root / "outcomes.json").write_text(json.dumps(outcomes))
    return root


@pytest.mark.parametrize("round", [*ROUNDS, "lora"])
def test_a_round_begins_as_its_reference_with_dropout_off(root: Path, round: str) -> None:
    first = records(root / f"alone-{round}")[0]
    assert (first["log_ratio_square"], first["discriminator_accuracy"]) == (0, 0.5)
    assert first["model_loss"] == first["reference_loss"]
    assert math.log(2) < first["loss/model"] < (1 + ALPHA) * math.log(2)  # rows without label are not pushed away
    assert records(root / f"alone-{round}")[-1]["log_ratio_square"] > 0


def test_an_adapter_alone_learns_above_its_reference(root: Path) -> None:
    learnt = {name for name in state_of(root / "alone-lora") if name.startswith("model.")}
    assert learnt and all("lora" in name for name in learnt if "weights" in name or "ema" in name)


def test_preferences_begin_undecided(root: Path) -> None:
    first = records(root / "alone-dpo")[0]
    assert (first["margin"], first["preference_accuracy"]) == (0, 0.5)
    assert first["loss/model"] == pytest.approx(math.log(2), abs=1e-6)
    assert records(root / "alone-dpo")[-1]["margin"] != 0


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_the_curve_of_one(root: Path, kind: str) -> None:
    assert_two_ranks_give_the_curve_of_one(root, kind, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_goes_on_in_its_middle(root: Path, kind: str) -> None:
    assert_a_resumed_run_is_the_uninterrupted_one(root, kind)


def test_a_pool_of_other_weights_and_a_model_that_forgets_its_data_end_the_run(root: Path) -> None:
    (refused, why), (guarded, because) = json.loads((root / "outcomes.json").read_text())
    assert refused == "ConfigError" and "were drawn by other weights (000000000000)" in why
    assert guarded == "Diverged" and "more than 2 times the reference's" in because and "The newest checkpoint is" in because
