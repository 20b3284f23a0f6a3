"""The pool of a round of DDO: a fleet that loses an actor, and a stage that is stopped, draw what one process draws, each sample once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gentrain.cluster.launch import launch
from gentrain.cluster.session import session
from gentrain.config import Document, build, load_plugins
from gentrain.models.adapters import digest_of
from gentrain.recipes.generate import Generate
from gentrain.training.loop import Outcome
from gentrain.training.roles import load_weights
from gentrain.training.run import RunConfig, parse_run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PLUGIN = str(Path(__file__).with_name("plugin_mortal.py"))
COUNT = 450  # five chunks


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with session():
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    run = run_of(tmp_path_factory.mktemp("reference") / "run", "flow_matching")
    launch(run)
    return run


def run_of(output: Path, method: Any, **settings: Any) -> RunConfig:
    values = {
        "method": method, "data": "rings", "model": {"name": "mlp", "width": 16}, "engine": "torch", "plugins": [PLUGIN],
        "training": {"samples": 320, "batch_size": 32, "log_every": 32}, "output": str(output),
    }  # fmt: skip
    return parse_run(Document(values | settings, "test"))


def pool_of(reference: RunConfig, place: Path, actors: int, **settings: Any) -> Generate:
    load_plugins(Document({"plugins": [PLUGIN]}, "test"))
    sampler = {"name": "mortal_euler", "steps": 3, "marker": str(place / "died"), "log": str(place / "drawn"), "at": 230, **settings}
    place.mkdir(exist_ok=True)
    return build(Generate, Document({"run": str(reference.directory), "count": COUNT, "actors": actors, "sampler": sampler}, "test"))


def same(one: Path, other: Path) -> bool:
    a, b = (load_file(place / "samples.safetensors") for place in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def starts(place: Path) -> list[int]:
    return sorted(map(int, (place / "drawn").read_text().split()))


def test_an_actor_that_dies_in_a_round_loses_nothing_and_draws_nothing_twice(reference: RunConfig, tmp_path: Path) -> None:
    Generate(str(reference.directory), COUNT, sampler=reference.sampler.__class__(steps=3)).execute(tmp_path / "alone")
    pool_of(reference, tmp_path / "fleet", 2).execute(tmp_path / "fleet" / "pool")
    assert (tmp_path / "fleet" / "died").exists()
    assert same(tmp_path / "alone", tmp_path / "fleet" / "pool")
    assert starts(tmp_path / "fleet") == [0, 100, 200, 300, 400]
    info = json.loads((tmp_path / "fleet" / "pool" / "info.json").read_text())
    assert info["weights"] == digest_of(load_weights(str(reference.directory)))
    settings: dict[str, Any] = {"roles": {"reference": {"weights": str(reference.directory)}}}
    rows = []
    for name in ("alone", "fleet/pool"):
        round_ = run_of(tmp_path / f"round-{name[:5]}", {"name": "ddo", "pool": str(tmp_path / name), "beta": 5}, **settings)
        assert launch(round_) is Outcome.FINISHED
        rows.append([json.loads(line)["loss/model"] for line in (round_.directory / "metrics.jsonl").read_text().splitlines()])
    assert rows[0] == rows[1]


def test_a_pool_that_was_stopped_goes_on_where_it_was(reference: RunConfig, tmp_path: Path) -> None:
    stage = pool_of(reference, tmp_path / "first", 0, raises=True)
    pool = tmp_path / "first" / "pool"
    with pytest.raises(RuntimeError, match="asked to stop"):
        stage.execute(pool)
    assert starts(tmp_path / "first") == [0, 100] and not (pool / "info.json").exists()
    torn, sound = (pool / "chunks" / f"{first:09d}.safetensors" for first in (0, 100))
    torn.write_bytes(torn.read_bytes()[:50])
    stage.execute(pool)
    assert starts(tmp_path / "first") == [0, 0, 100, 200, 300, 400] and not sound.parent.exists()
    whole = pool_of(reference, tmp_path / "whole", 0, at=-1)
    whole.execute(tmp_path / "whole" / "pool")
    assert same(pool, tmp_path / "whole" / "pool")


@pytest.mark.parametrize("change", [{"seed": 1}, {"labels": [1]}, {"count": 420}])
def test_chunks_of_something_else_are_drawn_anew(reference: RunConfig, tmp_path: Path, change: dict[str, Any]) -> None:
    place = tmp_path / "place"
    stage = pool_of(reference, place, 0, raises=True)
    with pytest.raises(RuntimeError, match="asked to stop"):
        stage.execute(place / "pool")
    for key, value in change.items():
        setattr(stage, key, value)
    stage.execute(place / "pool")
    anew = [0, 100, 200, 300, 400]
    assert starts(place) == sorted([0, 100, *(anew if "count" not in change else anew[2:])])
    other = pool_of(reference, tmp_path / "other", 0, at=-1)
    for key, value in change.items():
        setattr(other, key, value)
    other.execute(tmp_path / "other" / "pool")
    assert same(place / "pool", tmp_path / "other" / "pool")


def test_chunks_of_other_weights_are_drawn_anew(reference: RunConfig, tmp_path: Path) -> None:
    place = tmp_path / "place"
    stage = pool_of(reference, place, 0, raises=True)
    with pytest.raises(RuntimeError, match="asked to stop"):
        stage.execute(place / "pool")
    chunk = place / "pool" / "chunks" / "000000000.safetensors"
    save_file({"x": torch.zeros(100, 2)}, chunk, {"digest": "of others"})
    stage.execute(place / "pool")
    assert starts(place) == [0, 0, 100, 200, 300, 400]
    assert load_file(place / "pool" / "samples.safetensors")["x"][0].abs().sum() > 0
