"""Tokens on two ranks: the autoencoder with a codebook, maximum likelihood, rounds of DDO: a pool, on the fly, a reference asked once."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gentrain.data.latents import MANIFEST, file_digest
from gentrain.data.tokens import FILES, Manifest, Tokens, Walks
from gentrain.recipes.generate import Generate
from gentrain.recipes.reference_likelihood import ReferenceLikelihood
from gentrain.training.run import save_config
from tests.distributed.cases import Job, records, run_of, train_all, values
from tests.distributed.three_ways import (
    assert_a_resumed_run_is_the_uninterrupted_one,
    assert_two_ranks_give_the_curve_of_one,
    train_three_ways,
)
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(480)]

ROUNDS = ("pool", "on_the_fly", "known")  # the last: of the pool, with what the reference said once
WALKS: dict[str, Any] = {"places": 7, "length": 5}
KINDS = ("vq", "likelihood", *ROUNDS)


def prepare(root: Path) -> None:
    """base: the run that is the reference. fakes: what it draws."""
    base = settings_of(root, "base", "likelihood", "torch") | {"output": str(root / "base")}
    save_config(run_of(base))
    run_ranks(1, train_all, [Job(base)])
    Generate(str(root / "base"), count=50, seed=1, decoded=False).execute(root / "fakes")
    write_tokens(root / "tokens")
    ReferenceLikelihood(str(root / "base"), str(root / "fakes"), Tokens(str(root / "tokens"))).execute(root / "said")


def write_tokens(directory: Path) -> None:
    """Walks in place of what a stage `tokenize` makes of images."""
    walks = Walks(**WALKS)
    directory.mkdir()
    for split, name in FILES.items():
        save_file(walks.split(split).batch(torch.arange(40)), directory / name)
    manifest = Manifest(
        vocabulary=7, scales=[], length=5, image=[1, 1, 5], class_names=list(walks.class_names), licence="",
        files={name: file_digest(directory / name) for name in FILES.values()},
    )  # fmt: skip
    (directory / MANIFEST).write_text(json.dumps(manifest))


def settings_of(root: Path, name: str, kind: str, engine: Any) -> dict[str, Any]:
    settings = values(root / f"{name}-{kind}", "vq_autoencoder" if kind == "vq" else "maximum_likelihood", engine)
    if kind == "vq":
        model = {"name": "vq", "channels": [8, 8], "codes": 6, "code_dim": 3, "norm_groups": 4, "scales": [1, 2, 4]}
        return settings | {"data": "digits", "model": model}
    settings["data"] = {"name": "tokens", "directory": str(root / "tokens")} if kind == "known" else {"name": "walks", **WALKS}
    settings["model"] = {
        "name": "token_transformer",
        "vocabulary": 7,
        "layers": 1,
        "heads": 2,
        "head_dim": 4,
        "dropout": 0.3 if kind in ROUNDS else 0.0,
    }
    if kind in ROUNDS:
        pool = "on_the_fly" if kind == "on_the_fly" else str(root / "fakes")
        settings["method"] = {"name": "token_ddo", "pool": pool, "alpha": 2.0, "beta": 0.5, "label_dropout": 0.2}
        settings["method"] |= {"known": str(root / "said")} if kind == "known" else {}
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
    if round == "known":  # other batches, other roundings
        assert first["log_ratio_square"] < 1e-10 and first["model_loss"] == pytest.approx(first["reference_loss"], rel=1e-5)
    else:
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
