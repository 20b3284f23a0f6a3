"""Checkpoints are read as they were written, in any stretches; what is damaged, foreign or forged is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gentrain.training import checkpoint
from gentrain.training.checkpoint import MANIFEST, STATE, CheckpointError, Piece, Shard, manifest, sha256
from gentrain.training.storage import LocalStorage
from tests.reliability.publishing import publish

WEIGHTS = "model.weights.00000.safetensors"
VALUES = {"a": torch.arange(3.0), "b": torch.arange(6).reshape(2, 3).t()}


def _pieces(values: dict[str, torch.Tensor]) -> Shard:
    return {name: Piece(value.reshape(-1), 0, tuple(value.shape)) for name, value in values.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / publish(
        LocalStorage(tmp_path), 64, {"model.weights": [_pieces(VALUES)], "critic.weights": [_pieces({"a": torch.ones(3)})]}
    )


def _verify(path: Path) -> None:
    with LocalStorage(path.parent).open(path.name) as opened:
        opened.verify()
        for stem in ("model.weights", "critic.weights"):
            opened.shards(stem).whole()


def test_what_is_published_is_read_back(path: Path) -> None:
    with LocalStorage(path.parent).open(path.name) as opened:
        opened.verify()
        assert opened.state == {"samples": 64}
        whole = opened.shards("model.weights").whole()
        assert whole.keys() == VALUES.keys() and all(torch.equal(whole[name], value) for name, value in VALUES.items())
        assert opened.shards("critic.weights").whole()["a"].tolist() == [1, 1, 1]
        with pytest.raises(CheckpointError, match=r"has no model\.ema\.00000\.safetensors"):
            opened.shards("model.ema")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_stretch_is_read_from_any_way_of_sharing_it_out(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 30))
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=4)))
    values = torch.randn(size)
    shards = [{"w": Piece(values[a:b], a, (1, size))} for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    storage = LocalStorage(tmp_path_factory.mktemp("shards"))
    name = publish(storage, 1, {"m.weights": shards})
    start = data.draw(st.integers(0, size))
    count, rank = data.draw(st.integers(0, size - start)), data.draw(st.integers(0, 5))
    with storage.open(name) as opened:
        assert torch.equal(opened.shards("m.weights", rank).read("w", start, count, (1, size)), values[start : start + count])


def test_a_rank_that_finds_its_part_in_its_own_file_opens_no_other(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    shards = [{"w": Piece(torch.full((2,), float(rank)), 2 * rank, (6,)), "step": Piece(torch.ones(1), 0, ())} for rank in range(3)]
    name = publish(storage, 1, {"m.optimizer": shards})
    for rank in (0, 2):
        (tmp_path / name / f"m.optimizer.{rank:05d}.safetensors").write_bytes(b"")
    with storage.open(name) as opened:
        own = opened.shards("m.optimizer", rank=1)
        assert own.read("w", 2, 2, (6,)).tolist() == [1, 1] and own.read("step", 0, 1, ()).item() == 1
        with pytest.raises(CheckpointError, match=r"m\.optimizer\.00000\.safetensors differs"):
            own.read("w", 1, 2, (6,))


def test_keys_come_from_a_rank_that_holds_something(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    first: Shard = {"step": Piece(torch.ones(1), 0, ())}
    name = publish(storage, 1, {"m.optimizer": [first, first | {"exp_avg/w": Piece(torch.ones(2), 0, (2,))}]})
    with storage.open(name) as opened:
        assert opened.shards("m.optimizer").keys() == {"step": False, "exp_avg": True}


def test_another_network_is_refused_by_the_tensor_that_does_not_fit(path: Path) -> None:
    with LocalStorage(path.parent).open(path.name) as opened:
        with pytest.raises(CheckpointError, match=r"'a' has shape \[3\], this network needs \[1, 3\]"):
            opened.shards("model.weights").read("a", 0, 3, (1, 3))
        with pytest.raises(CheckpointError, match="lacks a part of 'c'"):
            opened.shards("model.weights").read("c", 0, 3, (3,))


def _flip(path: Path) -> None:
    data = bytearray((path / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (path / WEIGHTS).write_bytes(data)


def _link(path: Path) -> None:
    shutil.move(path / STATE, path.parent / "elsewhere")
    (path / STATE).symlink_to(path.parent / "elsewhere")


def _fifo(path: Path) -> None:
    (path / MANIFEST).unlink()
    os.mkfifo(path / MANIFEST)


def _swap(path: Path) -> None:
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes((path / "critic.weights.00000.safetensors").read_bytes())
    (path / "critic.weights.00000.safetensors").write_bytes(content)


def _edit(**changes: object) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps({**content, **changes}))

    return damage


def _outside(path: Path) -> None:
    (path.parent / "outside").write_text("x")
    content = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(manifest(content["sha256"] | {"../outside": sha256(path.parent / "outside")}))


@pytest.mark.parametrize(
    "damage, file, says",
    [
        (_flip, WEIGHTS, "differs from its hash"),
        (_swap, "critic.weights.00000.safetensors", "differs from its hash"),
        (lambda path: (path / WEIGHTS).unlink(), WEIGHTS, "missing"),
        (lambda path: (path / STATE).unlink(), STATE, "missing"),
        (lambda path: (path / "new").touch(), "new", "remove it"),
        (_link, STATE, "is a link"),
        (_fifo, MANIFEST, "or no file at all"),
        (_outside, "../outside", "missing"),
        (lambda path: (path / MANIFEST).write_text((path / MANIFEST).read_text()[:40]), MANIFEST, "damaged"),
        (lambda path: (path / MANIFEST).write_text("{}"), MANIFEST, "damaged"),
        (lambda path: (path / MANIFEST).write_text("[]"), MANIFEST, "damaged"),
        (lambda path: (path / MANIFEST).write_text("[" * 100_000), MANIFEST, "damaged"),
        (lambda path: (path / MANIFEST).write_bytes(b"\xff\xfe"), MANIFEST, "damaged"),
        (lambda path: (path / MANIFEST).write_text((path / MANIFEST).read_text() + "\n"), MANIFEST, "its form"),
        (_edit(sha256=["state.json"]), MANIFEST, "damaged"),
        (_edit(sha256={}), MANIFEST, "its form"),
        (lambda path: (path / MANIFEST).write_text(manifest({})), "critic", "remove it"),
        (lambda path: (path / MANIFEST).unlink(), MANIFEST, "never published"),
        (_edit(format=99), "", "format 99"),
    ],
)
def test_damage_is_refused_naming_the_file_and_the_remedy(path: Path, damage: Callable[[Path], None], file: str, says: str) -> None:
    damage(path)
    with pytest.raises(CheckpointError, match=says) as raised:
        _verify(path)
    assert str(path) in str(raised.value) and file in str(raised.value)
    assert any(remedy in str(raised.value) for remedy in ("write another one's name", "use the version that wrote it"))


def test_the_remedy_names_the_other_whole_checkpoints(path: Path) -> None:
    """The newest first; not those that are damaged too, as far as their manifests show."""
    for samples in (8, 16, 24):
        publish(LocalStorage(path.parent), samples, {"model.weights": [_pieces(VALUES)]})
    (path.parent / f"{16:012d}" / STATE).unlink()
    (path.parent / f"{16:012d}" / MANIFEST).write_text("{")
    _flip(path)
    with pytest.raises(CheckpointError) as raised:
        _verify(path)
    assert str(raised.value).endswith(f"write another one's name into LATEST (whole beside it: {24:012d}, {8:012d})")
    shutil.rmtree(path.parent / f"{24:012d}")
    shutil.rmtree(path.parent / f"{8:012d}")
    with pytest.raises(CheckpointError, match=r"\(whole beside it: none\)$"):
        _verify(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_change_of_any_file_is_refused_by_its_name(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("changed")
    shards = {"model.weights": [_pieces(VALUES), {}], "critic.weights": [_pieces({"a": torch.ones(3)})]}
    path = root / publish(LocalStorage(root), 64, shards)
    files = sorted(file.name for file in path.iterdir())
    file = data.draw(st.sampled_from(files))
    content = (path / file).read_bytes()
    change = data.draw(st.sampled_from(("flip", "truncate", "append", "remove", "replace")))
    if change == "flip":
        position, mask = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(1, 255))
        (path / file).write_bytes(content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :])
    elif change == "truncate":
        (path / file).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    elif change == "append":
        (path / file).write_bytes(content + data.draw(st.binary(min_size=1, max_size=8)))
    elif change == "remove":
        (path / file).unlink()
    else:
        shutil.copyfile(path / data.draw(st.sampled_from([other for other in files if other != file])), path / file)
    with pytest.raises(CheckpointError) as raised:
        _verify(path)
    # A changed manifest may name another file as the wrong one.
    assert (file if file != MANIFEST else str(path)) in str(raised.value)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Puts another file in the place of the weights, with the hash in the manifest that it needs."""
    write(path / WEIGHTS)
    content = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(manifest(content["sha256"] | {WEIGHTS: sha256(path / WEIGHTS)}))


def _layout(**layout: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        save_file({"a": torch.arange(3.0)}, path, metadata={"layout": json.dumps(layout)})

    return write


def _header(length: int, content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(struct.pack("<Q", length) + content)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a tensor"),
        _header(2**63, b"{}"),
        _header(200_000_000, b"{}"),
        _header(72, b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'[:72]),
        _header(78, b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'),
        lambda path: save_file({"a": torch.arange(3.0)}, path),
        _layout(),
        _layout(a=[0, 3], b=[0, 3]),
        _layout(a=[-1, 3]),
        _layout(a=[1, 3]),
        _layout(a=["0", 3]),
        _layout(a={}),
        lambda path: save_file({"a": torch.arange(4.0).reshape(2, 2)}, path, metadata={"layout": '{"a": [0, 4]}'}),
    ],
)
def test_a_forged_file_with_the_right_hash_is_refused_by_its_name(path: Path, write: Callable[[Path], object]) -> None:
    _replace(path, write)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} is no file of a checkpoint .*write another one's name"):
        _verify(path)


def test_a_shape_that_claims_more_than_the_file_holds_takes_no_memory(path: Path) -> None:
    _replace(path, _layout(a=[0, 2**50]))
    with pytest.raises(CheckpointError, match="lacks a part of 'a'"):
        _verify(path)


@pytest.mark.parametrize("what", ["root", "directory", WEIGHTS, MANIFEST])
@pytest.mark.parametrize("bits", [0o020, 0o002])
def test_what_others_may_write_is_refused_with_the_command_that_mends_it(path: Path, what: str, bits: int) -> None:
    target = {"root": path.parent, "directory": path}.get(what, path / what)
    target.chmod(target.stat().st_mode | bits)
    with pytest.raises(CheckpointError, match="may be written by other users; if you trust what is there: chmod -R go-w ") as raised:
        _verify(path)
    assert str(raised.value).endswith(str(target))
    target.chmod(target.stat().st_mode & ~0o022)
    _verify(path)


def test_what_belongs_to_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.os, "getuid", lambda: 12345)
    if path.stat().st_uid == 0:  # root's files are anyone's to trust
        _verify(path)
        os.chown(path / WEIGHTS, 4321, -1)
    with pytest.raises(CheckpointError, match=r"belongs to user .*copy it and use the copy"):
        _verify(path)


def test_a_checkpoint_that_is_a_link_is_refused(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{path} is a link"):
        _verify(path)


def test_a_loose_umask_does_not_make_files_that_others_may_write(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        root = tmp_path / "new" / "checkpoints"
        path = root / publish(LocalStorage(root), 64, {"model.weights": [_pieces(VALUES)], "critic.weights": [_pieces(VALUES)]})
    finally:
        os.umask(previous)
    assert {entry.stat().st_mode & 0o777 for entry in (root, path)} == {0o755}
    assert not any(entry.stat().st_mode & 0o022 for entry in path.iterdir())
    _verify(path)
