"""Rounds of DDO as stages: samples of the reference, beta from a probe, a round, the best checkpoint promoted, the next round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gentrain.config import ConfigError
from gentrain.metrics.distances import energy_distance
from gentrain.models.adapters import digest_of
from gentrain.recipes.base import load_recipe, run_recipe
from gentrain.recipes.evaluate import read_held_out, read_metrics
from gentrain.recipes.promote import Promote
from gentrain.training.roles import load_weights
from gentrain.training.run import open_run

RUN: dict[str, Any] = {
    "data": {"name": "spiral", "held_out": 200},
    "model": {"name": "mlp", "width": 16, "depth": 1},
    "path": "variance_exploding",
    "prediction": "edm",
    "sampler": {"name": "heun", "steps": 3},
    "engine": "torch",
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "training": {"samples": 640, "batch_size": 32, "log_every": 64, "checkpoint_every": 320, "keep_last": 2},
}


def round_of(reference: str, pool: str, **method: Any) -> dict[str, Any]:
    method = {"name": "ddo", "pool": pool, "times": "log_normal", "alpha": 1, "beta": 5, **method}
    return RUN | {"method": method, "roles": {"reference": {"weights": reference}}}


STAGES: dict[str, Any] = {
    "start": {"name": "train", "run": RUN | {"method": {"name": "diffusion", "times": "log_normal"}}},
    "fakes": {"name": "generate", "run": "${output:start}", "count": 70},
    "scale": {"name": "calibrate", "run": round_of("${output:start}", "${output:fakes}"), "steps": 12},
    "round": {"name": "train", "run": round_of("${output:start}", "${output:fakes}", beta="${output:scale}")},
    "best": {"name": "promote", "runs": ["${output:round}"], "before": "${output:start}", "count": 150},
    "fakes2": {"name": "generate", "run": "${output:best}", "count": 70},
    "round2": {"name": "train", "run": round_of("${output:best}", "${output:fakes2}", beta="${output:scale}")},
}


def run(place: Path, stages: dict[str, Any]) -> Path:
    (place / "recipe.yaml").write_text(yaml.safe_dump({"stages": stages, "output": str(place / "out")}, sort_keys=False))
    run_recipe(load_recipe(place / "recipe.yaml"), lambda line: None)
    return place / "out"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("rounds"), STAGES)


def test_samples_are_kept_with_the_digest_of_their_weights(out: Path) -> None:
    info = json.loads((out / "fakes" / "info.json").read_text())
    assert info["weights"] == digest_of(load_weights(str(out / "start")))
    assert json.loads((out / "best" / "promotion.json").read_text())["promoted"].startswith("round")
    assert info["weights"] != json.loads((out / "fakes2" / "info.json").read_text())["weights"]


def test_beta_is_a_share_of_one_over_the_spread_and_becomes_part_of_the_configuration(out: Path) -> None:
    found = json.loads((out / "scale" / "calibration.json").read_text())
    last = json.loads((out / "scale" / "probe" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["samples"] == 12 * 32
    assert found["beta"] == pytest.approx(0.3 * last["log_ratio_square"] ** -0.5, rel=0.01)
    method: Any = open_run(out / "round").method
    assert method.beta == found["beta"]
    probe: Any = open_run(out / "scale" / "probe").method
    assert (probe.alpha, probe.beta) == (0, 1.0)


def test_the_nearest_checkpoint_is_promoted(out: Path) -> None:
    told = json.loads((out / "best" / "promotion.json").read_text())
    assert list(told["distances"]) == ["round at 320", "round at 640", "start at 640"]
    assert told["distances"][told["promoted"]] == min(told["distances"].values())
    place, samples = told["promoted"].split(" at ")
    promoted, source = open_run(out / "best"), open_run(out / place)
    assert promoted.storage.names() == [f"{int(samples):012d}"]
    assert promoted.method == source.method
    with promoted.storage.open(promoted.storage.names()[0]) as copy, source.storage.open(promoted.storage.names()[0]) as original:
        copy.verify()
        assert copy.hashes == original.hashes
    names = [metric["name"] for metric in read_metrics(out / "best")]
    assert names == list(dict.fromkeys(["energy distance, start at 640", f"energy distance, {told['promoted']}"]))
    assert not (out / "best" / "candidates").exists()


def test_what_is_compared_are_samples_of_each_checkpoint(out: Path, tmp_path: Path) -> None:
    Promote([str(out / "start")], count=150, seed=3).execute(tmp_path / "best")
    told = json.loads((tmp_path / "best" / "promotion.json").read_text())
    newest = run_stage(tmp_path, out)
    real = read_held_out(open_run(out / "start").data, 150)["x"]
    assert told["distances"]["start at 640"] == pytest.approx(energy_distance(newest, real))
    assert told["distances"]["start at 320"] != told["distances"]["start at 640"]


def run_stage(place: Path, out: Path) -> torch.Tensor:
    from gentrain.recipes.generate import Generate

    Generate(str(out / "start"), count=150, seed=3).execute(place / "drawn")
    return load_file(place / "drawn" / "samples.safetensors")["x"]


def test_a_finished_recipe_is_skipped_and_a_pool_of_another_round_refused(out: Path) -> None:
    said: list[str] = []
    run_recipe(load_recipe(out.parent / "recipe.yaml"), said.append)
    assert all("skipped" in line for line in said) and len(said) == len(STAGES)
    stages = STAGES | {"round2": {"name": "train", "run": round_of("${output:best}", "${output:fakes}", beta="${output:scale}")}}
    with pytest.raises(ConfigError, match="were drawn by other weights"):
        run(out.parent, stages)


def test_a_number_far_from_the_spread_is_refused(out: Path, tmp_path: Path) -> None:
    stages = {"scale": {"name": "calibrate", "run": round_of(str(out / "start"), str(out / "fakes"), beta=1e6), "steps": 2}}
    with pytest.raises(ConfigError, match="is certain of every sample") as caught:
        run(tmp_path, stages)
    assert caught.value.key == "run.method.beta"
    with pytest.raises(ConfigError, match="this is a run of diffusion"):
        run(tmp_path, {"scale": {"name": "calibrate", "run": STAGES["start"]["run"]}})
    with pytest.raises(ConfigError, match="at least one run"):
        Promote([])
