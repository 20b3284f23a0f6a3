"""Runs that keep their checkpoints in a bucket and are killed: `python -m tests.reliability.kills_s3 FOLDER URL`.

Each is a fork of this process, as in kills.py; this process itself talks to the store only through boto3.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import torch

from gentrain.training import object_storage
from gentrain.training.checkpoint import MANIFEST
from gentrain.training.storage import LATEST
from tests.distributed.cases import Job, train_all, values
from tests.reliability.kills import ALONE, AT, TRAINING, die, in_fork

OLD = f"{48:012d}"
READING = "while a checkpoint is read"

# moment -> (call of the file system, end of its path, how many such calls come before it, whether it is still done)
MOMENTS: dict[str, tuple[str, str, int, bool]] = {
    "before the first file": ("put_file", "", 0, False),
    "between two files": ("put_file", "", 2, True),
    "before the manifest": ("pipe_file", f"{AT}/{MANIFEST}", 0, False),
    "between manifest and LATEST": ("pipe_file", f"{AT}/{MANIFEST}", 0, True),
    "between LATEST and deletion": ("pipe_file", LATEST, 0, True),
    "between an old manifest and its files": ("rm_file", f"{OLD}/{MANIFEST}", 0, True),
    "during deletion": ("rm", OLD, 0, False),
    READING: ("get_file", "", 3, True),
}


class _Mortal:
    """A file system whose process dies at one of its calls that are about the checkpoint AT, or while it is there; see MOMENTS."""

    def __init__(self, fs: Any, moment: str):
        self._fs, self._moment, self._calls = fs, moment, 0

    def __getattr__(self, name: str) -> Any:
        operation, end, before, done = MOMENTS[self._moment]
        act = getattr(self._fs, name)
        if name != operation:
            return act

        def call(*arguments: Any, **options: Any) -> Any:
            path = str(arguments[1] if name == "put_file" else arguments[0])
            concerned = path.endswith(end) if end else self._moment == READING or f"/{AT}/" in path
            if name == "pipe_file" and end == LATEST:
                concerned &= arguments[1] == AT.encode()
            if not concerned:
                return act(*arguments, **options)
            self._calls += 1
            if self._calls > before:
                if done:
                    act(*arguments, **options)
                if name == "rm":  # one by one, as a store does that is asked for many
                    self._fs.rm_file(self._fs.find(path)[0])
                die()
            return act(*arguments, **options)

        return call


def _train(directory: Path, url: str, moment: str | None = None, **training: Any) -> None:
    if moment is not None:
        make = object_storage.ObjectStorage.__init__

        def mortal(self: object_storage.ObjectStorage, *arguments: Any) -> None:
            make(self, *arguments)
            self._fs = _Mortal(self._fs, moment)

        object_storage.ObjectStorage.__init__ = mortal  # type: ignore[method-assign]
    outcome = train_all(ALONE, [Job(values(directory, **TRAINING | {"checkpoints": url} | training))])[0]
    assert outcome == ("finished", ""), outcome


def _copy(bucket: str, source: str, target: str) -> None:
    client = boto3.client("s3")
    for item in client.list_objects_v2(Bucket=bucket, Prefix=f"{source}/")["Contents"]:
        key = target + item["Key"].removeprefix(source)
        client.copy_object(Bucket=bucket, Key=key, CopySource={"Bucket": bucket, "Key": item["Key"]})


def main(root: Path, url: str) -> dict[str, list[int]]:
    """Moment -> exit statuses of the run that is killed and of the one that goes on. `<moment>-killed` is a copy of what the kill left."""
    bucket = url.removeprefix("s3://")
    train_all(ALONE, [Job(values(root / "whole", **TRAINING | {"keep_last": 99}))])  # here, so that forks find imported what it imports
    statuses = {}
    for moment in MOMENTS:
        for asynchronous in (False, True) if moment != READING else (False,):
            name = f"{moment}, asynchronous" if asynchronous else moment
            directory, where = root / name, f"{url}/{name}"
            if moment == READING:
                assert in_fork(lambda d=directory, w=where: _train(d, w, samples=48)) == 0
            kill: Callable[[], None] = lambda d=directory, w=where, m=moment, a=asynchronous: _train(d, w, m, async_checkpoints=a)  # noqa: E731
            statuses[name] = [in_fork(kill)]
            _copy(bucket, name, f"{name}-killed")
            statuses[name].append(in_fork(lambda d=directory, w=where: _train(d, w)))
    return statuses


if __name__ == "__main__":
    torch.set_num_threads(1)  # others do not survive a fork
    folder = Path(sys.argv[1])
    (folder / "told.json").write_text(json.dumps(main(folder, sys.argv[2])))
