"""Calls of a worker shared out over actors: a cache of several is that of one process to the last bit, and who dies or raises is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gentrain.cluster import session
from gentrain.cluster.fleet import room, spread
from gentrain.config import Document, build, load_plugins
from gentrain.data.digits import Digits
from gentrain.data.latents import MANIFEST
from gentrain.metrics.features import ImageEncoder
from gentrain.recipes.encode import Encode
from gentrain.recipes.features import FeatureSource
from tests.models.pipelines import stable_diffusion
from tests.models.readers import vit

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

PLUGIN = str(Path(__file__).with_name("plugin_pictures.py"))


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with session.session():
        session.start()
        yield


def encode(pipeline: Path, directory: Path, actors: int, marker: Path) -> None:
    """With files of 8 rows."""
    load_plugins(Document({"plugins": [PLUGIN]}, "test"))
    data = {"name": "plugin_pictures", "marker": str(marker)}
    stage = {"model": {"name": "pretrained", "directory": str(pipeline)}, "data": data, "shard": 8, "actors": actors}
    build(Encode, Document(stage, "test")).execute(directory)


def test_a_cache_is_the_same_whoever_writes_it_and_whoever_dies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One actor is killed as it reads; one image is corrupt; one file is there already."""
    pipeline, marker = stable_diffusion(tmp_path / "sd"), tmp_path / "killed"
    marker.touch()  # nobody is killed in this process
    encode(pipeline, tmp_path / "alone", 0, marker)
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    encode(pipeline, tmp_path / "fleet", 2, marker)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "fleet").iterdir()}
    (tmp_path / "fleet" / "train-00001.safetensors").unlink()
    (tmp_path / "fleet" / "train-00002.safetensors").unlink()
    marker.unlink()
    encode(pipeline, tmp_path / "fleet", 2, marker)
    assert marker.exists()
    again = {path.name for path in (tmp_path / "fleet").iterdir() if path.stat().st_mtime_ns != times.get(path.name)}
    assert again == {"train-00001.safetensors", "train-00002.safetensors", MANIFEST}
    assert told == ["left out: picture 3 is torn"]
    assert [record.getMessage() for record in caplog.records if "left out" in record.getMessage()] == told * 2
    alone, fleet = (json.loads((tmp_path / name / MANIFEST).read_text()) for name in ("alone", "fleet"))
    assert alone == fleet and len(fleet["splits"]["train"]) == 3  # with the SHA-256 of each file
    assert len(load_file(tmp_path / "fleet" / "train-00000.safetensors")["x"]) == 7
    assert not list((tmp_path / "fleet").glob(".*"))


def test_results_come_in_order_and_what_a_worker_raises_is_raised() -> None:
    calls = [(number,) for number in range(5)]
    for actors in (0, 2):
        assert list(spread(Fraction, (1, 2), "__mul__", calls, actors, "halves")) == [Fraction(number, 2) for number in range(5)]
        with pytest.raises(ZeroDivisionError, match=r"^Fraction\(1, 0\)$"):
            list(spread(Fraction, (1, 0), "__mul__", calls, actors, "halves"))
        assert list(spread(Fraction, (1, 0), "__mul__", [], actors, "halves")) == []


def test_features_are_the_same_whoever_reads_them(tmp_path: Path) -> None:
    encoder, x = ImageEncoder(str(vit(tmp_path / "vit"))), Digits().split("train").x[:1_100]
    alone, fleet = (FeatureSource(None, encoder, actors).read(x) for actors in (0, 2))
    assert alone.shape == (1_100, 16) and torch.equal(alone, fleet)


@pytest.mark.parametrize("resources, actors, expected", [
    ({"CPU": 8.0}, 3, (3, 0)), ({"CPU": 2.0}, 5, (2, 0)), ({}, 5, (1, 0)),
    ({"CPU": 16.0, "GPU": 8.0}, 3, (3, 1)), ({"CPU": 16.0, "GPU": 2.0}, 5, (2, 1)), ({"CPU": 1.0, "GPU": 2.0}, 5, (1, 1)),
])  # fmt: skip
def test_no_actor_of_a_fleet_waits_for_ever_nor_does_without_the_gpus(
    resources: dict[str, float], actors: int, expected: tuple[int, int]
) -> None:
    assert room(resources, actors) == expected
