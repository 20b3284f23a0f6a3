"""Runs that are killed: `python -m tests.reliability.kills FOLDER [KILLS SEED]`, at chosen moments or so many times at random.

Each is a fork of this process, since importing torch takes most of a short run's time.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard  # as a run does, once for all forks

from gentrain import export as exporting
from gentrain.cluster.launch import launch
from gentrain.training import saving, storage
from gentrain.training.checkpoint import Piece, Shard, Shards, write_shard
from gentrain.training.run import CHECKPOINTS
from gentrain.training.storage import LocalStorage
from gentrain.training.world import World
from tests.distributed.cases import Job, newest, run_of, train_all, values
from tests.reliability.cases import three_roles
from tests.reliability.publishing import publish

ALONE = World(0, 1, torch.device("cpu"))
AT = f"{72:012d}"  # the checkpoint at which a run dies; the ones before it are at 24 and 48 samples, the end is at 120
TRAINING = {"samples": 120, "checkpoint_every": 24, "keep_last": 1}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # in a thread, the signal may come a moment later


def in_fork(act: Callable[[], object]) -> int:
    """The exit status of a fork that does `act`, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _during_a_shard() -> None:
    def half(path: Path, shard: Any) -> None:
        write_shard(path, shard)
        if AT in str(path) and "student.weights" in path.name:
            os.truncate(path, path.stat().st_size // 2)
            die()

    saving.write_shard = half


def _before_the_manifest() -> None:
    complete = LocalStorage.complete
    LocalStorage.complete = lambda self, name, text: die() if name == AT else complete(self, name, text)  # type: ignore[method-assign]


def _after_sync(wanted: Callable[[Path], bool]) -> Callable[[], None]:
    def patch() -> None:
        sync = storage._sync

        def last(path: Path) -> None:
            sync(path)
            if wanted(path):
                die()

        storage._sync = last

    return patch


def _during_deletion() -> None:
    remove = shutil.rmtree

    def half(path: Path, **options: Any) -> None:
        if Path(path).name == f".{48:012d}.old.tmp":
            next(Path(path).glob("*.safetensors")).unlink()
            die()
        remove(path, **options)

    storage.shutil.rmtree = half  # type: ignore[assignment]


def _during_reading() -> None:
    read, calls = Shards.read, []

    def some(self: Shards, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 15:
            die()
        return read(self, *arguments)

    Shards.read = some  # type: ignore[method-assign]


MOMENTS: dict[str, Callable[[], None]] = {
    "during a shard": _during_a_shard,
    "before the manifest": _before_the_manifest,
    "before the rename": _after_sync(lambda path: path.name == f".{AT}.tmp"),
    "between rename and LATEST": _after_sync(lambda path: path.name == "checkpoints" and (path / AT).exists()),
    "before LATEST is replaced": _after_sync(lambda path: path.name == ".LATEST.tmp" and (path.parent / AT).exists()),
    "during deletion": _during_deletion,
}


def _train(directory: Path, **training: Any) -> None:
    outcome = train_all(ALONE, [Job(values(directory, **TRAINING | training))])[0]
    assert outcome == ("finished", ""), outcome


def _of_two_ranks(directory: Path) -> None:
    """Puts what two ranks would have written, each half of every tensor, in the place of the newest checkpoint."""
    found = newest(directory)
    shards: dict[str, list[Shard]] = {}
    with LocalStorage(found.parent).open(found.name) as checkpoint:
        for stem in {file.rsplit(".", 2)[0] for file in checkpoint.hashes if file.endswith(".safetensors")}:
            shards[stem] = [{}, {}]
            for name, value in checkpoint.shards(stem).whole().items():
                flat, cut = value.reshape(-1), (value.numel() + 1) // 2
                shards[stem][0][name] = Piece(flat[:cut], 0, tuple(value.shape))
                shards[stem][1][name] = Piece(flat[cut:], cut, tuple(value.shape))
        state = checkpoint.state
    publish(LocalStorage(found.parent), shards=shards, **state)


def _export(out: Path, mortal: bool) -> None:
    class Pipeline:
        def save_pretrained(self, directory: Path) -> None:
            directory.mkdir()
            (directory / "weights").write_text("whole")

    exporting._pipeline = lambda *_: Pipeline()
    exporting._write_card = lambda *_: die() if mortal else None
    exporting.export(out, None, None, class_names=(), licence="", config={})  # type: ignore[arg-type]


def main(root: Path) -> dict[str, list[int]]:
    """Moment -> exit statuses of the run that is killed and of the one that goes on.

    `whole` is never killed; `<moment>-killed` is a copy of what the kill left.
    """
    _train(root / "whole", keep_last=99)  # here, so that forks find imported what a first step imports
    statuses = {}
    for name, mortal in MOMENTS.items():
        for asynchronous in (False, True):
            moment = f"{name}, asynchronous" if asynchronous else name

            def killed(directory: Path = root / moment, patch: Callable[[], None] = mortal, asynchronous: bool = asynchronous) -> None:
                patch()
                _train(directory, async_checkpoints=asynchronous)

            statuses[moment] = [in_fork(killed)]
            shutil.copytree(root / moment, root / f"{moment}-killed")
            statuses[moment].append(in_fork(lambda moment=moment: _train(root / moment)))

    assembly = root / "during assembly for another world size"
    train_all(ALONE, [Job(values(assembly, **TRAINING), stop_at=4)])
    _of_two_ranks(assembly)

    def read_and_die() -> None:
        _during_reading()
        _train(assembly)

    statuses[assembly.name] = [in_fork(read_and_die)]
    shutil.copytree(assembly, root / f"{assembly.name}-killed")
    statuses[assembly.name].append(in_fork(lambda: _train(assembly)))
    statuses["during export"] = [in_fork(lambda mortal=mortal: _export(root / "exported" / "out", mortal)) for mortal in (True, False)]
    return statuses


def at_random(root: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kills one run again and again, at times drawn uniformly, verifies what each kill leaves, and then lets it come to its end.

    Every other attempt saves asynchronously. Leaves `killed`, and `whole`, which was not, in `root`.
    """
    draw = random.Random(seed)

    def settings(name: str, samples: int, asynchronous: bool) -> dict[str, Any]:
        run = three_roles(root / name, "torch") | {"schedule": "constant"}
        return run | {"training": run["training"] | {"samples": samples, "checkpoint_every": 60, "async_checkpoints": asynchronous}}

    train_all(ALONE, [Job(three_roles(root / "warm", "torch"))])  # here, so that forks find imported what a first step imports
    storage, reached, resumed = LocalStorage(root / "killed" / CHECKPOINTS), [0], 0
    while len(reached) <= kills:
        run = run_of(settings("killed", 10**9, len(reached) % 2 == 0))
        pid = os.fork()
        if pid == 0:
            launch(run)
            os._exit(1)  # it has no end
        time.sleep(draw.uniform(0.05, 2.0))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        name = storage.latest()
        if name is not None:
            resumed += reached[-1] > 0
            with storage.open(name) as checkpoint:
                checkpoint.verify()
        reached.append(int(name or 0))
    total = reached[-1] + 600
    statuses = [in_fork(lambda name=name: launch(run_of(settings(name, total, False)))) for name in ("killed", "whole")]
    return {"statuses": statuses, "reached": reached, "resumed": resumed}


if __name__ == "__main__":
    torch.set_num_threads(1)  # others do not survive a fork
    folder, arguments = Path(sys.argv[1]), [int(value) for value in sys.argv[2:]]
    (folder / "told.json").write_text(json.dumps(at_random(folder, *arguments) if arguments else main(folder)))
