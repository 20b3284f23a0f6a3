"""Tokens on two ranks: the autoencoder with a codebook, maximum likelihood, and rounds of DDO with a pool and on the fly."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gentrain.recipes.generate import Generate
from gentrain.training.run import save_config
from tests.distributed.cases import Job, records, run_of, train_all, values
from tests.distributed.three_ways import (
    assert_a_resumed_run_is_the_uninterrupted_one,
    assert_two_ranks_give_the_curve_of_one,
    train_three_ways,
)
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(480)]

ROUNDS = ("pool", "on_the_fly")
KINDS = ("vq", "likelihood", *ROUNDS)


def prepare(root: Path) -> None:
    """base: the run that is the reference. fakes: what it draws."""
    base = settings_of(root, "base", "likelihood", "torch") | {"output": str(root / "base")}
    save_config(run_of(base))
    run_ranks(1, train_all, [Job(base)])
    Generate(str(root / "base"), count=50, seed=1, decoded=False).execute(root / "fakes")


def settings_of(root: Path, name: str, kind: str, engine: Any) -> dict[str, Any]:
    settings = values(root / f"{name}-{kind}", "vq_autoencoder" if kind == "vq" else "maximum_likelihood", engine)
    if kind == "vq":
        model = {"name": "vq", "channels": [8, 8], "codes": 6, "code_dim": 3, "norm_groups": 4, "scales": [1, 2, 4]}
        return settings | {"data": "digits", "model": model}
    settings["data"] = {"name": "walks", "places": 7, "length": 5}
    settings["model"] = {
        "name": "token_transformer",
        "vocabulary": 7,
        "layers": 1,
        "heads": 2,
        "head_dim": 4,
        "dropout": 0.3 if kind in ROUNDS else 0.0,
    }
    if kind in ROUNDS:
        pool = str(root / "fakes") if kind == "pool" else "on_the_fly"
        settings["method"] = {"name": "token_ddo", "pool": pool, "alpha": 2.0, "beta": 0.5, "label_dropout": 0.2}
        settings["roles"] = {"reference": {"weights": str(root / "base")}}
    return settings


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    prepare(root)
    train_three_ways(partial(settings_of, root), KINDS)
    return root


@pytest.mark.parametrize("round", ROUNDS)
def test_a_round_begins_as_its_reference_with_dropout_off(root: Path, round: str) -> None:
    first = records(root / f"alone-{round}")[0]
    assert (first["log_ratio_square"], first["discriminator_accuracy"]) == (0, 0.5)
    assert first["model_loss"] == first["reference_loss"]
    assert math.log(2) < first["loss/model"] < 3 * math.log(2)  # rows without label are not pushed away
    assert records(root / f"alone-{round}")[-1]["log_ratio_square"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_the_curve_of_one(root: Path, kind: str) -> None:
    assert_two_ranks_give_the_curve_of_one(root, kind, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_in_its_middle(root: Path, kind: str) -> None:
    assert_a_resumed_run_is_the_uninterrupted_one(root, kind)
