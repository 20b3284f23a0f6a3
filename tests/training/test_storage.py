"""A published checkpoint is whole at every moment, in a directory and in an object store, whatever dies in between."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gentrain.config import ConfigError
from gentrain.training import storage as storages
from gentrain.training.checkpoint import MANIFEST, STATE, Checkpoint, CheckpointError, Piece
from gentrain.training.object_storage import ObjectStorage, check_storage, open_storage
from gentrain.training.remedies import refuse_url
from gentrain.training.storage import LATEST, LocalStorage, Storage
from tests.reliability.publishing import publish

FILES = {MANIFEST, STATE, "model.weights.00000.safetensors"}


def _publish(storage: Storage, samples: int) -> str:
    return publish(storage, samples, {"model.weights": [{"a": Piece(torch.full((3,), float(samples)), 0, (3,))}]})


def _whole(storage: Storage, name: str | None) -> bool:
    assert name is not None
    with storage.open(name) as checkpoint:
        checkpoint.verify()
        return checkpoint.shards("model.weights").whole()["a"].tolist() == [float(name)] * 3


@pytest.fixture(params=["directory", "memory"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Storage]:
    """Opens the same storage each time, as another process would."""
    url = str(tmp_path / "checkpoints") if request.param == "directory" else f"memory://{uuid.uuid4()}/run"
    return lambda: open_storage(url, tmp_path)


def test_what_is_published_is_found(make: Callable[[], Storage]) -> None:
    storage = make()
    assert storage.latest() is None and storage.names() == []
    for samples in (5, 40, 300):
        _publish(storage, samples)
    assert make().names() == ["000000000005", "000000000040", "000000000300"]
    assert all(_whole(make(), name) for name in make().names())
    assert make().latest() == "000000000300"
    make().delete("000000000005")
    assert make().names() == ["000000000040", "000000000300"]


def test_one_of_the_same_samples_takes_the_place_of_the_former(make: Callable[[], Storage]) -> None:
    _publish(make(), 64)
    publish(make(), 64, {"other.weights": []})
    with make().open("000000000064") as checkpoint:
        checkpoint.verify()
        assert set(checkpoint.hashes) == {STATE}


def test_what_is_discarded_leaves_nothing(make: Callable[[], Storage]) -> None:
    storage = make()
    _publish(storage, 1)
    storage.prepare("000000000002")
    storage.put("000000000002", "x", lambda path: path.write_text("x"))
    storage.discard("000000000002")
    storage.discard("000000000002")
    assert storage.names() == ["000000000001"]
    assert not isinstance(storage, LocalStorage) or not list(storage.root.glob(".*"))


@pytest.mark.parametrize("name", ["000000000065", "", "..", "/"])
def test_latest_that_names_nothing_is_an_error_that_lists_what_is_there(make: Callable[[], Storage], name: str) -> None:
    storage = make()
    _publish(storage, 64)
    if isinstance(storage, LocalStorage):
        (storage.root / LATEST).write_text(name)
    else:
        assert isinstance(storage, ObjectStorage)
        storage._fs.pipe_file(f"{storage._root}/{LATEST}", name.encode())
    with pytest.raises(CheckpointError, match="write one of these into it: 000000000064") as raised:
        storage.latest()
    assert f"{storage.where}/{LATEST}" in str(raised.value)


@pytest.mark.parametrize("kept", [False, True])
def test_a_reader_whose_checkpoint_is_deleted_meanwhile_reads_the_newer_one(make: Callable[[], Storage], kept: bool) -> None:
    """As `sample` beside a run that trains on. Where nothing newer is named, what went wrong is raised."""
    reader, trainer, names = make(), make(), []
    assert reader.read_newest(lambda checkpoint: pytest.fail("there is none")) is None
    _publish(trainer, 64)

    def read(checkpoint: Checkpoint) -> list[float]:
        names.append(checkpoint.where.rpartition("/")[2])
        if len(names) == 1:
            if not kept:
                _publish(trainer, 128)
            trainer.delete("000000000064")
        return checkpoint.shards("model.weights").whole()["a"].tolist()

    if kept:
        with pytest.raises((CheckpointError, OSError)):
            reader.read_newest(read)
    else:
        assert reader.read_newest(read) == [128.0] * 3 and names == ["000000000064", "000000000128"]


def test_what_is_deleted_between_latest_and_the_names_is_not_missed(make: Callable[[], Storage]) -> None:
    reader, trainer = make(), make()
    _publish(trainer, 64)
    names = reader.names

    def late() -> list[str]:
        if trainer.names() == ["000000000064"]:
            _publish(trainer, 128)
            trainer.delete("000000000064")
        return names()

    reader.names = late  # type: ignore[method-assign]
    assert reader.latest() == "000000000128"


class _Dying:
    """A file system that dies at its call number `at` that changes something, before or after it is done."""

    def __init__(self, fs: Any, at: int, after: bool):
        self._fs, self._at, self._after, self.calls = fs, at, after, 0

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._fs, name)
        if name not in ("put_file", "pipe_file", "rm", "rm_file"):
            return call

        def counted(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self._at and not self._after:
                raise KeyboardInterrupt
            result = call(*arguments, **options)
            if self.calls == self._at:
                raise KeyboardInterrupt
            return result

        return counted


@pytest.mark.parametrize("after", [False, True])
def test_an_object_store_is_whole_after_a_death_at_any_call(tmp_path: Path, after: bool) -> None:
    """The attempt before died between the manifest of 64 and LATEST; this one publishes 64 again and deletes 32."""
    at = 0
    while True:
        at += 1
        there = ObjectStorage(f"memory://{uuid.uuid4()}/run", tmp_path)
        _publish(there, 32)
        _publish(there, 64)
        there._fs.pipe_file(f"{there._root}/{LATEST}", b"000000000032")
        mortal = ObjectStorage(there.where, tmp_path)
        mortal._fs = _Dying(mortal._fs, at, after)
        try:
            _publish(mortal, 64)
            mortal.delete("000000000032")
        except KeyboardInterrupt:
            pass
        else:
            break
        assert _whole(there, there.latest())
        assert all(_whole(there, name) for name in there.names())
        there.sweep()
        assert all(MANIFEST in files for files in there._found().values())
        assert _publish(there, 64) == there.latest() and _whole(there, "000000000064")
    assert at == 9  # delete 2, files 2, manifest, LATEST, delete 2; the ninth call never came
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_of_an_object_store_comes_last_and_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, calls = ObjectStorage(f"memory://{uuid.uuid4()}/run", tmp_path), []

    class Recording(_Dying):
        def __getattr__(self, name: str) -> Any:
            call = getattr(self._fs, name)

            def record(*arguments: Any, **options: Any) -> Any:
                if name != "find":
                    calls.append((name, str(arguments[1 if name == "put_file" else 0]).rpartition("/")[2]))
                return call(*arguments, **options)

            return record

    storage._fs = Recording(storage._fs, 0, False)
    _publish(storage, 64)
    assert calls[2:] == [("pipe_file", MANIFEST), ("pipe_file", LATEST)]
    calls.clear()
    storage.delete("000000000064")
    assert calls == [("rm_file", MANIFEST), ("rm", "000000000064")]


def test_files_of_an_object_store_pass_through_directories_that_do_not_stay(tmp_path: Path) -> None:
    storage = ObjectStorage(f"memory://{uuid.uuid4()}/run", tmp_path)
    name = _publish(storage, 64)
    with storage.open(name) as checkpoint:
        assert checkpoint.file(STATE).is_relative_to(tmp_path)
    (tmp_path / ".transfer-of-the-dead").mkdir()
    storage.sweep()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_damaged_or_gone_in_an_object_store_is_named(tmp_path: Path) -> None:
    storage = ObjectStorage(f"memory://{uuid.uuid4()}/run", tmp_path)
    name = _publish(storage, 64)
    weights = f"{storage._root}/{name}/model.weights.00000.safetensors"
    storage._fs.pipe_file(weights, b"x")
    with (
        storage.open(name) as checkpoint,
        pytest.raises(CheckpointError, match=rf"^{storage.where}/{name}/model\.weights\.00000\S+ differs"),
    ):
        checkpoint.verify()
    storage._fs.rm_file(weights)
    with pytest.raises(CheckpointError, match=r"model\.weights\.00000\.safetensors is missing"), storage.open(name):
        pass


def test_urls_that_nothing_serves_are_refused_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    check_storage("runs/elsewhere", "k")
    check_storage("file:///scratch/run", "k")
    check_storage("memory://run", "k")
    with pytest.raises(ConfigError, match="k: checkpoints cannot be kept at nonsense://x: Protocol not known"):
        check_storage("nonsense://x", "k")

    def missing(protocol: str) -> None:
        raise ImportError("Install s3fs")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    with pytest.raises(ConfigError, match=r"Install s3fs; pip install 'gentrain\[s3\]'"):
        check_storage("s3://bucket/run", "k")


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("~/run", "k: ~/run would be a directory called '~' here; write the path out"),
        ("file://~me/run", "called '~me' here"),
        ("s3:bucket/run", r"k: s3:bucket/run is neither a path nor a URL; write \./s3:\.\.\. or s3://\.\.\."),
        ("file:/scratch/run", "neither a path nor a URL"),
    ],
)
def test_what_only_looks_like_a_place_is_refused(place: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_storage(place, "k")
    if "://" not in place:
        with pytest.raises(ConfigError, match=says):
            refuse_url(place, "k")


@pytest.mark.parametrize("place", ["./s3:bucket", "runs/a:b", "/scratch/~run", "C"])
def test_strange_names_are_paths_all_the_same(place: str) -> None:
    check_storage(place, "k")
    refuse_url(place, "k")


def test_a_checkpoint_under_another_ones_name_is_refused(make: Callable[[], Storage]) -> None:
    storage = make()
    _publish(storage, 64)
    if isinstance(storage, LocalStorage):
        (storage.root / "000000000064").rename(storage.root / "000000000128")
    else:
        assert isinstance(storage, ObjectStorage)
        storage._fs.mv(f"{storage._root}/000000000064", f"{storage._root}/000000000128", recursive=True)
    with (
        storage.open("000000000128") as checkpoint,
        pytest.raises(CheckpointError, match=f"128 is a checkpoint of 64 samples by its {STATE}"),
    ):
        _ = checkpoint.state


def test_a_file_url_is_a_directory(tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}", tmp_path)
    assert isinstance(storage, LocalStorage) and storage.root == tmp_path


def test_leftovers_of_a_dead_writer_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".000000000032.tmp").mkdir()
    (tmp_path / ".000000000032.tmp" / "half").touch()
    (tmp_path / f".{LATEST}.tmp").touch()
    _publish(LocalStorage(tmp_path), 64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000064", LATEST]


def test_what_has_no_name_of_a_checkpoint_is_left_alone(make: Callable[[], Storage]) -> None:
    """However much it looks like one."""
    storage = make()
    storage.claim("a", "/runs/a")
    _publish(storage, 32)
    theirs = ["2024/notes.txt", "0/img.png", "00000000032/x", "-00000000032/x", "\u00b2/x", ".editor.tmp", ".2024.old.tmp", ".LATEST.tmp~"]
    for name in theirs:
        if isinstance(storage, LocalStorage):
            (storage.root / name).parent.mkdir(exist_ok=True)
            (storage.root / name).write_text("mine")
        else:
            storage._fs.pipe_file(f"{storage._root}/{name}", b"mine")  # type: ignore[attr-defined]
    storage = make()
    storage.claim("a", "/runs/a")
    storage.sweep()
    _publish(storage, 64)
    assert storage.names() == [f"{32:012d}", f"{64:012d}"]
    storage.sweep()
    for name in theirs:
        if isinstance(storage, LocalStorage):
            assert (storage.root / name).read_text() == "mine"
        else:
            assert storage._fs.cat_file(f"{storage._root}/{name}") == b"mine"  # type: ignore[attr-defined]


def test_a_name_of_more_digits_is_one_where_there_are_so_many_samples(make: Callable[[], Storage]) -> None:
    storage = make()
    for samples in (10**12, 10**12 - 1):
        _publish(storage, samples)
    assert storage.names() == ["999999999999", "1000000000000"] and storage.latest() == "999999999999"


@pytest.mark.parametrize("call", range(1, 8))
def test_a_crash_at_any_sync_leaves_a_readable_checkpoint(tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seven syncs: three files, the directory, its rename, the new pointer, and the pointer's rename."""
    storage, sync, calls = LocalStorage(tmp_path), storages._sync, []
    first = _publish(storage, 64)

    def die(path: Path) -> None:
        calls.append(path)
        if len(calls) == call:
            raise KeyboardInterrupt
        sync(path)

    monkeypatch.setattr(storages, "_sync", die)
    with pytest.raises(KeyboardInterrupt):
        _publish(storage, 128)
    assert storage.latest() == (first if call < 7 else "000000000128")
    assert all(_whole(storage, name) for name in storage.names())
    monkeypatch.undo()
    assert _publish(storage, 128) == storage.latest() and _whole(storage, "000000000128")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000064", "000000000128", LATEST]


def test_every_file_and_directory_is_synced_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(storages, "_sync", lambda path: synced.append(path.name))
    _publish(LocalStorage(tmp_path), 64)
    assert set(synced[:3]) == FILES
    assert synced[3:] == [".000000000064.tmp", tmp_path.name, f".{LATEST}.tmp", tmp_path.name]


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    _publish(storage, 64)
    there: list[bool] = []
    remove = shutil.rmtree
    monkeypatch.setattr(storages.shutil, "rmtree", lambda path: (there.append(bool(storage.names())), remove(path)))
    storage.delete("000000000064")
    assert there == [False] and sorted(path.name for path in tmp_path.iterdir()) == [LATEST]


def test_of_a_checkpoint_that_was_moved_behind_a_link_the_link_alone_is_deleted(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "checkpoints")
    name = _publish(storage, 16)
    _publish(storage, 32)
    (storage.root / name).rename(tmp_path / "elsewhere")
    (storage.root / name).symlink_to(tmp_path / "elsewhere")
    storage.delete(name)
    assert not (storage.root / name).is_symlink() and any((tmp_path / "elsewhere").iterdir())
    (storage.root / f".{name}.old.tmp").symlink_to(tmp_path / "elsewhere")  # as an earlier version left it
    storage.sweep()
    assert not (storage.root / f".{name}.old.tmp").is_symlink() and any((tmp_path / "elsewhere").iterdir())


def test_a_directory_that_others_may_write_is_refused_at_the_start(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(CheckpointError, match="chmod -R go-w"):
        LocalStorage(tmp_path).sweep()
    tmp_path.chmod(0o755)
