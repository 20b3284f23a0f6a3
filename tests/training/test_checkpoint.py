"""Checkpoints are whole or absent, and what is damaged is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gentrain.training import checkpoint
from gentrain.training.checkpoint import LATEST, MANIFEST, STATE, CheckpointError, latest, load_tensors, publish, verify


def _publish(root: Path, samples: int, keep_last: int = 2) -> Path:
    tensors = {"model.weights": {"a": torch.full((3,), float(samples)), "b": torch.arange(6).reshape(2, 3).t()}}
    return publish(root, samples, tensors, {"samples": samples}, keep_last)


def test_what_is_published_is_read_back(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    path = _publish(tmp_path, 64)
    assert latest(tmp_path) == path and path.name == "000000000064"
    assert verify(path) == {"samples": 64}
    assert torch.equal(load_tensors(path, "model.weights")["a"], torch.full((3,), 64.0))
    assert torch.equal(load_tensors(path, "model.weights")["b"], torch.arange(6).reshape(2, 3).t())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000000064", LATEST]


def test_the_newest_are_kept_by_number(tmp_path: Path) -> None:
    for samples in (5, 40, 300):
        _publish(tmp_path, samples)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000000040", "000000000300", LATEST]


def test_what_was_just_published_is_kept_beside_newer_ones(tmp_path: Path) -> None:
    """After LATEST was set back by hand, the numbers ahead of it are the older attempt's."""
    for samples in (300, 400):
        _publish(tmp_path, samples)
    path = _publish(tmp_path, 200)
    assert latest(tmp_path) == path and verify(path)


def _flip(path: Path) -> None:
    data = bytearray((path / "model.weights.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.weights.safetensors").write_bytes(data)


def _link(path: Path) -> None:
    shutil.move(path / STATE, path.parent / "elsewhere")
    (path / STATE).symlink_to(path.parent / "elsewhere")


def _edit(**changes: object) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        manifest = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps({**manifest, **changes}))

    return damage


@pytest.mark.parametrize(
    "damage, file, says",
    [
        (_flip, "model.weights.safetensors", "differs from its hash"),
        (lambda path: (path / "model.weights.safetensors").unlink(), "model.weights.safetensors", "missing"),
        (lambda path: (path / STATE).unlink(), STATE, "missing"),
        (lambda path: (path / "new").touch(), "new", "remove it"),
        (_link, STATE, "not a file of its own"),
        (lambda path: (path / MANIFEST).write_text((path / MANIFEST).read_text()[:40]), MANIFEST, "damaged"),
        (lambda path: (path / MANIFEST).write_text("{}"), MANIFEST, "damaged"),
        (lambda path: (path / MANIFEST).write_text("[]"), MANIFEST, "damaged"),
        (_edit(sha256=["state.json"]), MANIFEST, "damaged"),
        (_edit(sha256={}), "", "remove it"),
        (lambda path: (path / MANIFEST).unlink(), MANIFEST, "never published"),
        (_edit(format=99), "", "format 99"),
    ],
)
def test_damage_is_refused_naming_the_file_and_the_remedy(tmp_path: Path, damage: Callable[[Path], None], file: str, says: str) -> None:
    path = _publish(tmp_path, 64)
    damage(path)
    with pytest.raises(CheckpointError, match=says) as raised:
        verify(path)
    assert str(path) in str(raised.value) and file in str(raised.value)
    assert any(remedy in str(raised.value) for remedy in ("resume from another", "use the version that wrote it"))


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    path = _publish(tmp_path, 64)
    (tmp_path / "outside").write_text("x")
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["sha256"]["../outside"] = checkpoint._hash(tmp_path / "outside")
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside"):
        verify(path)


@pytest.mark.parametrize("name", ["000000000065", "", "..", "/"])
def test_latest_that_names_nothing_is_an_error_that_lists_what_is_there(tmp_path: Path, name: str) -> None:
    _publish(tmp_path, 64)
    (tmp_path / LATEST).write_text(name)
    with pytest.raises(CheckpointError, match="write one of these into it: 000000000064") as raised:
        latest(tmp_path)
    assert str(tmp_path / LATEST) in str(raised.value)


def test_leftovers_of_a_dead_writer_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".000000000032.tmp").mkdir()
    (tmp_path / ".000000000032.tmp" / "half").touch()
    (tmp_path / f".{LATEST}.tmp").touch()
    _publish(tmp_path, 64)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000000064", LATEST]


@pytest.mark.parametrize("call", range(1, 8))
def test_a_crash_at_any_sync_leaves_a_readable_checkpoint(tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seven syncs: three files, the directory, its rename, the new pointer, and the pointer's rename."""
    first, sync, calls = _publish(tmp_path, 64), checkpoint._sync, []

    def die(path: Path) -> None:
        calls.append(path)
        if len(calls) == call:
            raise KeyboardInterrupt
        sync(path)

    monkeypatch.setattr(checkpoint, "_sync", die)
    with pytest.raises(KeyboardInterrupt):
        _publish(tmp_path, 128)
    found = latest(tmp_path)
    assert found == (first if call < 7 else tmp_path / "000000000128")
    assert found is not None and verify(found)
    monkeypatch.undo()
    again = _publish(tmp_path, 128)
    assert latest(tmp_path) == again and verify(again) == {"samples": 128}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000000064", "000000000128", LATEST]


def test_every_file_and_directory_is_synced_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(checkpoint, "_sync", lambda path: synced.append(path.name))
    _publish(tmp_path, 64)
    files = {MANIFEST, STATE, "model.weights.safetensors"}
    assert set(synced[:3]) == files
    assert synced[3:] == [".000000000064.tmp", tmp_path.name, f".{LATEST}.tmp", tmp_path.name]
