"""Which checkpoints stay, what asynchronous saving promises, and how a failure is told."""

from __future__ import annotations

import errno
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from gentrain.training import saving
from gentrain.training import storage as storages
from gentrain.training.checkpoint import MANIFEST, STATE, Checkpoint, CheckpointError, Piece
from gentrain.training.object_storage import ObjectStorage
from gentrain.training.run import Training
from gentrain.training.saving import Saver, kept
from gentrain.training.storage import LATEST, LocalStorage
from gentrain.training.world import RankGroup, World
from tests.ranks import run_ranks

ALONE = World(0, 1, torch.device("cpu"))
NAN = float("nan")


@pytest.mark.parametrize(
    "metric, last, every, best_is, stay",
    [
        ({}, 2, 0, "lowest", set()),
        ({5: NAN, 40: NAN, 300: NAN}, 2, 0, "lowest", {40, 300}),
        ({10: NAN, 25: NAN, 33: NAN, 39: NAN, 41: NAN}, 1, 20, "lowest", {25, 41}),  # of [20, 40) and of [40, 60)
        ({10: 1.0, 20: 3.0, 30: 2.0, 40: 2.0}, 1, 0, "lowest", {10, 40}),
        ({10: 1.0, 20: 3.0, 30: 2.0, 40: 2.0}, 1, 0, "highest", {20, 40}),
        ({10: 1.0, 20: 1.0, 30: 2.0}, 1, 0, "lowest", {20, 30}),
        ({10: NAN, 20: -float("inf"), 30: 2.0, 40: 3.0}, 1, 0, "lowest", {30, 40}),
    ],
)
def test_which_checkpoints_stay(metric: dict[int, float], last: int, every: int, best_is: Any, stay: set[int]) -> None:
    assert kept(metric, last, every, best_is) == stay


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(-5, 5)), min_size=1, max_size=12), st.integers(1, 3), st.integers(0, 60))
def test_what_is_kept_of_a_run_is_what_would_be_kept_of_all_of_it(steps: list[tuple[int, float]], last: int, every: int) -> None:
    """Deleting on the way loses nothing that was to stay in the end."""
    there: dict[int, float] = {}
    everything: dict[int, float] = {}
    samples = 0
    for step, value in steps:
        samples += step
        there[samples] = everything[samples] = value
        stay = kept(there, last, every, "lowest")
        assert samples in stay
        there = {each: there[each] for each in stay}
    assert set(there) == kept(everything, last, every, "lowest")


def _saver(root: Path, world: World = ALONE, **training: Any) -> Saver:
    return Saver(LocalStorage(root), world, Training(samples=100, **training))


def _save(saver: Saver, samples: int, value: float = 0.0, **metrics: float) -> torch.Tensor:
    values = torch.full((4,), value)
    saver.save(samples, [("m.weights", {"w": Piece(values, 0, (4,))})], {"samples": samples, "metrics": metrics})
    return values


def _names(root: Path) -> list[int]:
    return [int(name) for name in LocalStorage(root).names()]


def _newest(root: Path) -> list[float]:
    storage = LocalStorage(root)
    name = storage.latest()
    assert name is not None
    with storage.open(name) as checkpoint:
        checkpoint.verify()
        return checkpoint.shards("m.weights").whole()["w"].tolist()


def test_the_best_and_every_so_many_stay_over_attempts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"keep_last": 1, "keep_every": 40, "keep_best": "loss"}
    saver = _saver(tmp_path, **options)
    for samples, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (45, 5.0)):
        _save(saver, samples, loss=loss)
    assert _names(tmp_path) == [20, 45]
    saver = _saver(tmp_path, **options)
    _save(saver, 60, loss=4.0)
    assert _names(tmp_path) == [20, 45, 60]
    _save(saver, 70, loss=0.5)
    assert _names(tmp_path) == [45, 70] and not caplog.text
    _save(saver, 75)
    assert _names(tmp_path) == [45, 70, 75] and "has no metric 'loss'" in caplog.text


def test_a_checkpoint_written_anew_is_judged_by_its_new_metric(tmp_path: Path) -> None:
    saver = _saver(tmp_path, keep_last=1, keep_best="loss")
    for samples, loss in ((10, 1.0), (20, 3.0), (20, 0.5), (30, 2.0)):
        _save(saver, samples, loss=loss)
    assert _names(tmp_path) == [20, 30]


def test_after_latest_was_set_back_what_lies_beyond_counts_once_the_run_has_passed_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The numbers ahead of LATEST are of a continuation that was given up: they must not take the places of what is new."""
    saver = _saver(tmp_path, keep_last=2)
    for samples in (100, 300, 400):
        _save(saver, samples)
    LocalStorage(tmp_path).point("000000000300")
    _save(saver, 150)
    _save(saver, 200)
    assert LocalStorage(tmp_path).latest() == "000000000200" and _names(tmp_path) == [150, 200, 300, 400]
    with _saver(tmp_path).newest() as checkpoint:
        assert checkpoint is not None and checkpoint.state["samples"] == 200
    assert "names 000000000200; what lies beyond it (000000000300, 000000000400) is not deleted before" in caplog.text
    _save(saver, 350)
    assert _names(tmp_path) == [300, 350, 400]
    _save(saver, 450)
    assert _names(tmp_path) == [400, 450]
    caplog.clear()
    with _saver(tmp_path).newest():
        assert not caplog.text


@contextmanager
def _slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing waits for the event."""
    go, write = threading.Event(), saving.write_shard

    def wait(*arguments: Any) -> None:
        assert go.wait(20)
        write(*arguments)

    monkeypatch.setattr(saving, "write_shard", wait)
    yield go
    go.set()


def test_training_goes_on_while_a_copy_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = _saver(tmp_path, async_checkpoints=True)
    with _slow(monkeypatch) as go:
        values = _save(saver, 10, value=1.0)
        values.fill_(9.0)  # the next step
        saver.poll()
        assert _names(tmp_path) == []
        go.set()
        saver.wait()
    assert _newest(tmp_path) == [1.0] * 4
    assert not list(tmp_path.glob(".*"))
    saver.close()


def test_poll_publishes_what_has_been_written(tmp_path: Path) -> None:
    saver = _saver(tmp_path, async_checkpoints=True)
    _save(saver, 10)
    assert saver._flight is not None
    saver._flight.written.result(20)
    saver.poll()
    assert _names(tmp_path) == [10]
    saver.close()


def test_a_second_checkpoint_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = _saver(tmp_path, async_checkpoints=True)
    with _slow(monkeypatch) as go:
        _save(saver, 10)
        threading.Timer(0.2, go.set).start()
        _save(saver, 20)
        assert _names(tmp_path) == [10]
    saver.wait()
    assert _names(tmp_path) == [10, 20]
    saver.close()


def _poll_while_rank_1_writes(world: World, root: Path) -> tuple[list[int], list[int]]:
    """Names after a poll when only rank 0 has written, and after one when both have."""
    group, go, write = RankGroup(world.size), threading.Event(), saving.write_shard

    def slow(*arguments: Any) -> None:
        assert world.rank == 0 or go.wait(20)
        write(*arguments)

    saving.write_shard = slow
    saver = _saver(root, world, async_checkpoints=True)
    _save(saver, 10)
    assert saver._flight is not None
    written = saver._flight.written
    if world.rank == 0:
        written.result(20)
    group.max(0)
    saver.poll()
    before = _names(root)
    group.max(0)
    go.set()
    written.result(20)
    group.max(0)
    saver.poll()
    group.max(0)
    saver.close()
    return before, _names(root)


@pytest.mark.distributed
def test_poll_publishes_once_all_ranks_have_written(tmp_path: Path) -> None:
    assert run_ranks(2, _poll_while_rank_1_writes, tmp_path) == [([], [10])] * 2
    assert {path.name for path in (tmp_path / f"{10:012d}").iterdir()} >= {f"m.weights.{rank:05d}.safetensors" for rank in range(2)}


@pytest.mark.parametrize("then", [Saver.wait, lambda saver: _save(saver, 30)])
def test_a_failure_of_the_thread_is_told_and_the_former_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: Callable[[Saver], object]
) -> None:
    saver = _saver(tmp_path, async_checkpoints=True)
    _save(saver, 10, value=1.0)
    saver.wait()

    def full(path: Path, shard: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(saving, "write_shard", full)
    _save(saver, 20)
    with pytest.raises(
        OSError,
        match=rf"no checkpoint could be written under {tmp_path}: .*the disk is full: .*set training.checkpoints; then run",
    ):
        then(saver)
    assert _newest(tmp_path) == [1.0] * 4 and not list(tmp_path.glob(".*"))
    saver.close()


def test_a_checkpoint_given_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = _saver(tmp_path, async_checkpoints=True)
    with _slow(monkeypatch) as go:
        _save(saver, 10)
        go.set()
        saver.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error, says",
    [
        (
            OSError(errno.EROFS, "Read-only file system"),
            "the file system is read-only: make it writable, or set training.checkpoints",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), "this user may not write there: mend the permissions"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the quota is used up: free some space"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full: free some space"),
        (ValueError("what"), "ValueError: what"),
    ],
)
def test_a_failure_names_the_place_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str) -> None:
    def fail(*_: object) -> None:
        raise error

    saver = _saver(tmp_path)
    _save(saver, 10)
    monkeypatch.setattr(saving, "write_shard", fail)
    with pytest.raises(OSError, match=f"under {tmp_path}: .*{says}"):
        _save(saver, 20)
    assert _names(tmp_path) == [10] and not list(tmp_path.glob(".*"))


def test_no_room_to_begin_is_told_too(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"under {tmp_path}/file: "):
        _save(_saver(tmp_path / "file"), 10)


def test_the_newest_is_opened_and_what_the_dead_left_is_gone(tmp_path: Path) -> None:
    with _saver(tmp_path).newest() as none:
        assert none is None
    _save(_saver(tmp_path), 10)
    (tmp_path / ".000000000020.tmp").mkdir()
    with _saver(tmp_path).newest() as checkpoint:
        assert isinstance(checkpoint, Checkpoint) and checkpoint.state["samples"] == 10
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "000000000010" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be read from .*state\.json differs"), _saver(tmp_path).newest():
        pass


class _Store:
    """A saver on an object store of its own, whose calls of which `trouble` (name of the call, path) is true raise ConnectionError.

    done: they have done their work all the same.
    """

    def __init__(self, scratch: Path, **training: Any):
        self.storage = ObjectStorage(f"memory://{uuid.uuid4()}/run", scratch)
        self.trouble: Callable[[str, str], bool] = lambda call, path: False
        self.done = False
        self._fs, self.storage._fs = self.storage._fs, self
        self.begin(**training)

    def begin(self, published: Callable[[str], object] = lambda name: None, **training: Any) -> None:
        self.saver = Saver(self.storage, ALONE, Training(samples=100, **training), published)

    def __getattr__(self, name: str) -> Any:
        act = getattr(self._fs, name)

        def call(*arguments: Any, **options: Any) -> Any:
            troubled = self.trouble(name, str(arguments[1] if name == "put_file" else arguments[0]))
            result = act(*arguments, **options) if self.done or not troubled else None
            if troubled:
                raise ConnectionError("reset by peer")
            return result

        return call

    def names(self) -> list[int]:
        return [int(name) for name in self.storage.names()]

    def newest(self) -> int:
        name = self.storage.latest()
        assert name is not None
        with self.storage.open(name) as checkpoint:
            checkpoint.verify()
        return int(name)


def _none(call: str, path: str) -> bool:
    return False


@pytest.mark.parametrize("call", ["rm", "rm_file"])
def test_a_deletion_that_fails_costs_no_checkpoint_and_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, call: str) -> None:
    store = _Store(tmp_path, keep_last=1)
    _save(store.saver, 10)
    store.trouble = lambda name, path: name == call
    for samples in (20, 25):  # the second one does not end because of what the first one left
        _save(store.saver, samples)
        assert store.newest() == samples
    assert "000000000020 is published; 000000000010 could not be deleted and stays for now: training.checkpoints: " in caplog.text
    store.trouble = _none
    _save(store.saver, 30)
    assert store.names() == [30] == [store.newest()] and list(store.storage._found()) == [f"{30:012d}"]


def test_a_directory_that_cannot_be_deleted_costs_no_checkpoint_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def open_elsewhere(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    saver = _saver(tmp_path, keep_last=1)
    _save(saver, 10)
    with monkeypatch.context() as patch:
        patch.setattr(storages.shutil, "rmtree", open_elsewhere)
        _save(saver, 20)
        _save(saver, 25, value=2.0)
    assert _names(tmp_path) == [25] and _newest(tmp_path) == [2.0] * 4
    assert "000000000010 could not be deleted and stays for now: OSError: [Errno 39]" in caplog.text
    _save(saver, 30)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{30:012d}", LATEST]


def test_a_metric_that_cannot_be_read_now_costs_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = _Store(tmp_path)
    _save(store.saver, 10, loss=1.0)
    _save(store.saver, 20, loss=3.0)
    store.begin(keep_last=1, keep_best="loss")  # another attempt, which has read no metric
    store.trouble = lambda name, path: name == "get_file"
    _save(store.saver, 30, loss=2.0)
    store.trouble = _none
    assert store.names() == [10, 20, 30] and store.newest() == 30
    assert "000000000030 is published; which older ones may go could not be found out now: training.checkpoints: " in caplog.text
    _save(store.saver, 40, loss=2.0)
    assert store.names() == [10, 40]


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize(
    "file, says", [(MANIFEST, "no checkpoint could be written"), (LATEST, f"{20:012d} is written, but LATEST may not name it")]
)
def test_a_failure_amid_publishing_takes_back_nothing_that_may_be_visible(tmp_path: Path, file: str, says: str, done: bool) -> None:
    """Also where the store has done what it was asked, and its answer was lost."""
    store = _Store(tmp_path, keep_last=1)
    _save(store.saver, 10)
    store.done, store.trouble = done, lambda name, path: name == "pipe_file" and path.endswith(file)
    with pytest.raises(OSError, match=f"{says}.*out of reach"):
        _save(store.saver, 20)
    store.trouble = _none
    assert store.names() == ([10] if file == MANIFEST and not done else [10, 20])
    assert store.newest() == (20 if file == LATEST and done else 10)
    store.begin(keep_last=1)
    _save(store.saver, 30)
    assert store.names() == [30] == [store.newest()]


def test_what_fails_after_publishing_says_what_is_published(tmp_path: Path) -> None:
    def full(name: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", f"identity.json, of {name}")

    store = _Store(tmp_path)
    store.begin(full)
    said = rf"^{store.storage.where}/{10:012d} is published, and the next start goes on from it; but: OSError: .*of {10:012d}"
    with pytest.raises(OSError, match=said):
        _save(store.saver, 10)
    assert store.newest() == 10


def test_a_failure_before_the_manifest_leaves_nothing_in_an_object_store(tmp_path: Path) -> None:
    store = _Store(tmp_path)
    _save(store.saver, 10)
    store.trouble = lambda name, path: name == "put_file" and path.endswith(STATE)
    with pytest.raises(OSError, match="no checkpoint could be written"):
        _save(store.saver, 20)
    assert list(store.storage._found()) == [f"{10:012d}"]
