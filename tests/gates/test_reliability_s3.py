"""A run killed at any moment of publishing to a bucket goes on from what it published last, bit for bit. See docs/reliability.md."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

# What the processes run that this gate starts, so that its result is told to be stale when it changes.
import gentrain.training.saving  # noqa: F401
from gentrain.training.object_storage import ObjectStorage
from tests.distributed.cases import difference, records, state_of
from tests.reliability.buckets import served
from tests.reliability.kills import AT
from tests.reliability.kills_s3 import MOMENTS, OLD, READING

pytestmark = [pytest.mark.gate, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"{moment}{how}" for moment in MOMENTS for how in ("", ", asynchronous") if moment != READING or not how]
PUBLISHED = ("between LATEST and deletion", "between an old manifest and its files", "during deletion")  # when the run dies


@dataclass
class Killed:
    folder: Path
    url: str

    def storage(self, name: str) -> ObjectStorage:
        return ObjectStorage(f"{self.url}/{name}", self.folder)

    def state(self, name: str) -> tuple[str, dict[str, torch.Tensor]]:
        """The newest checkpoint's name and all its tensors."""
        storage = self.storage(name)
        last = storage.latest()
        assert last is not None
        with storage.open(last) as checkpoint:
            checkpoint.verify()
            stems = sorted({file.rsplit(".", 2)[0] for file in checkpoint.hashes if file.endswith(".safetensors")})
            return last, {f"{stem}/{key}": value for stem in stems for key, value in checkpoint.shards(stem).whole().items()}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    root = tmp_path_factory.mktemp("kills")
    with served("kills") as url:
        done = subprocess.run([sys.executable, "-m", "tests.reliability.kills_s3", str(root), url], cwd=ROOT, timeout=800, check=False)
        assert done.returncode == 0
        yield Killed(root, url)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_published_state_is_there_and_the_next_attempt_ends_as_if_nothing_had_been(killed: Killed, name: str) -> None:
    assert json.loads((killed.folder / "told.json").read_text())[name] == [-9, 0]
    last, state = killed.state(f"{name}-killed")
    assert last == (AT if name.startswith(PUBLISHED) else OLD)
    assert difference(state, state_of(killed.folder / "whole", last)) == 0
    last, state = killed.state(name)
    assert last == f"{120:012d}" and difference(state, state_of(killed.folder / "whole")) == 0
    assert records(killed.folder / name) == records(killed.folder / "whole")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_dead_is_left(killed: Killed, name: str) -> None:
    storage = killed.storage(name)
    assert list(storage._found()) == storage.names() == [f"{120:012d}"]
    assert not list((killed.folder / name).glob(".transfer-*"))
