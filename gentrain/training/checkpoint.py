"""One checkpoint: files that each rank wrote for itself, and the manifest that says what belongs to it.

For each role and kind (`weights`, `ema`, `optimizer`) a rank writes one safetensors file with the stretches that it holds of each tensor,
flat, and says in the file's header where they start and what shape the whole has. Nothing is gathered. A rank that goes on reads its own
file, and the others only for what that one lacks, so that any number of ranks and any ZeRO stage may go on. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gentrain.document import ConfigError

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 2
_MOST_MANIFEST = 2**26  # characters: a hundred for each of 600,000 files
OWN = "own/"  # begins the names of an optimiser's tensors whose shapes are not those of the parameters: own/<key>/<parameter>
_LAYOUT = "layout"  # key in a file's header: name -> [start, *shape]


class CheckpointError(ConfigError):
    """A checkpoint that must not be read, or a place that must not be written. The message names it and the remedy."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a tensor: its elements [start, start + len(values)), flat. shape: of the whole."""

    values: Tensor
    start: int
    shape: tuple[int, ...]


Shard = dict[str, Piece]


def shard_file(stem: str, rank: int) -> str:
    return f"{stem}.{rank:05d}.safetensors"


def write_shard(path: Path, shard: Shard) -> None:
    layout = json.dumps({name: [piece.start, *piece.shape] for name, piece in shard.items()})
    save_file({name: piece.values.cpu().contiguous() for name, piece in shard.items()}, path, metadata={_LAYOUT: layout})


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest(hashes: dict[str, str]) -> str:
    return json.dumps({"format": FORMAT, "sha256": dict(sorted(hashes.items()))}, indent=1)


def refuse_foreign(path: Path) -> None:
    """Raises CheckpointError for what is no file or directory of its own, and for what another user could have written."""
    info = path.lstat()
    if not (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)):
        raise CheckpointError(f"{path} is a link, or no file at all; put a file in its place, or write another one's name into LATEST")
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CheckpointError(f"{path} may be written by other users; if you trust what is there: chmod -R go-w {shlex.quote(str(path))}")
    if info.st_uid not in (os.getuid(), 0):
        raise CheckpointError(f"{path} belongs to user {info.st_uid}, not to you; if you trust what is there, copy it and use the copy")


class Checkpoint:
    """A published checkpoint as it is read: each file is fetched, and compared with its hash, before anything in it is looked at.

    Every function raises CheckpointError, which names the file and the remedy.

    Args:
        place: where it is, for messages.
        name: of it in that place: the samples that were seen.
        present: names of the files that are there.
        fetch: file name -> a local file with its contents.
        others: the names of other whole checkpoints in the same place, the newest first; asked only when this one is refused.
    """

    def __init__(self, place: str, name: str, present: Iterable[str], fetch: Callable[[str], Path], others: Callable[[], list[str]] = list):
        self.where = where = f"{place}/{name}"
        self._samples, self._fetch, self._others = int(name), fetch, others
        self._verified: dict[str, Path] = {}
        names = set(present)
        if MANIFEST not in names:
            raise CheckpointError(f"{where} was never published: it has no {MANIFEST}; {self.instead}")
        self.hashes = self._read_manifest()
        for name in sorted(names - set(self.hashes) - {MANIFEST}):
            raise CheckpointError(f"{where}/{name} is not in the manifest; remove it or {self.instead}")
        for name in sorted({*self.hashes, STATE} - names):  # which also refuses names that point out of the directory
            raise CheckpointError(f"{where}/{name} is missing; {self.instead}")

    @property
    def instead(self) -> str:
        """What to do about a checkpoint that is damaged."""
        whole = ", ".join(self._others()[:5]) or "none"
        return f"write another one's name into LATEST (whole beside it: {whole})"

    def _read_manifest(self) -> dict[str, str]:
        try:
            with self._fetch(MANIFEST).open() as file:
                text = file.read(_MOST_MANIFEST)
            content = json.loads(text)
            hashes, version = dict(content["sha256"]), content["format"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{self.where}/{MANIFEST} is damaged ({error}); {self.instead}") from error
        if version != FORMAT:
            raise CheckpointError(f"{self.where} has format {version}, this version reads {FORMAT}; use the version that wrote it")
        if text != manifest(hashes):
            raise CheckpointError(f"{self.where}/{MANIFEST} is damaged (its form is not the one it is written in); {self.instead}")
        return hashes

    def file(self, name: str) -> Path:
        """A local file with the contents that the manifest says."""
        if name not in self._verified:
            path = self._fetch(name)
            if not path.is_file() or sha256(path) != self.hashes.get(name):
                raise CheckpointError(f"{self.where}/{name} differs from its hash in the manifest; {self.instead}")
            self._verified[name] = path
        return self._verified[name]

    def verify(self) -> None:
        """Reads every file."""
        for name in self.hashes:
            self.file(name)

    @cached_property
    def state(self) -> dict[str, Any]:
        """What is not a tensor."""
        try:
            state = dict(json.loads(self.file(STATE).read_text()))
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{self.where}/{STATE} is damaged ({error}); {self.instead}") from error
        samples = state.get("samples")
        if not isinstance(samples, int) or samples < 0:
            raise CheckpointError(f"{self.where}/{STATE} is damaged (samples: {samples!r:.100}); {self.instead}")
        if samples != self._samples:  # renamed, or copied over another
            raise CheckpointError(f"{self.where} is a checkpoint of {samples} samples by its {STATE}; {self.instead}")
        return state

    def shards(self, stem: str, rank: int = 0) -> Shards:
        """The tensors of `<role>.<kind>`, looked for in the file of `rank` first."""
        pattern = re.compile(rf"{re.escape(stem)}\.\d{{5}}\.safetensors")
        files = sorted(filter(pattern.fullmatch, self.hashes), key=lambda name: (name != shard_file(stem, rank), name))
        if not files:
            raise CheckpointError(f"{self.where} has no {shard_file(stem, 0)}; {self.instead}")
        return Shards(self, files)


class Shards:
    """The tensors of one stem, spread over the files of the ranks that wrote them. A file is opened when it is first needed."""

    def __init__(self, checkpoint: Checkpoint, files: list[str]):
        self._checkpoint, self._names = checkpoint, files
        self._opened: list[_ShardFile] = []

    def _files(self) -> Iterator[_ShardFile]:
        for index, name in enumerate(self._names):
            if index == len(self._opened):
                self._opened.append(_ShardFile(self._checkpoint.file(name), self._checkpoint))
            yield self._opened[index]

    def keys(self) -> dict[str, bool]:
        """What stands before the first slash of names -> whether there was one: alike for all ranks that hold a part of a parameter.

        Without those that begin with OWN, which are not.
        """
        keys: dict[str, bool] = {}
        for file in self._files():
            keys |= {name.partition("/")[0]: "/" in name for name in file.pieces if not name.startswith(OWN)}
            if any(keys.values()):
                break
        return keys

    def read(self, name: str, start: int, size: int, shape: tuple[int, ...]) -> Tensor:
        """Elements [start, start + size), flat, of a tensor that must have `shape`."""
        parts, position = [], start
        while position < start + size:
            file = next((file for file in self._files() if file.holds(name, position)), None)
            if file is None:
                raise CheckpointError(f"{self._checkpoint.where} lacks a part of {name!r}; this network is not the one that was saved")
            first, count, whole = file.pieces[name]
            if whole != shape:
                raise CheckpointError(f"{file.where}: {name!r} has shape {list(whole)}, this network needs {list(shape)}")
            end = min(start + size, first + count)
            parts.append(file.slice(name, position - first, end - first))
            position = end
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty(0)

    def foreign(self, name: str) -> CheckpointError:
        return CheckpointError(f"{self._checkpoint.where} holds {name!r}, of no parameter here; this network is not the one that was saved")

    def whole(self, prefix: str = "") -> dict[str, Tensor]:
        """Every tensor whose name begins with `prefix`, in its shape."""
        shapes = {name: shape for file in self._files() for name, (_, _, shape) in file.pieces.items() if name.startswith(prefix)}
        return {name: self.read(name, 0, math.prod(shape), shape).reshape(shape) for name, shape in shapes.items()}


class _ShardFile:
    """pieces: name -> (start, elements, shape of the whole)."""

    def __init__(self, path: Path, checkpoint: Checkpoint):
        self.where = where = f"{checkpoint.where}/{path.name}"
        try:
            self._file = safe_open(path, "pt")  # which refuses headers that claim more than the file holds
            layout = json.loads((self._file.metadata() or {})[_LAYOUT])
            self.pieces: dict[str, tuple[int, int, tuple[int, ...]]] = {}
            for name in self._file.keys():  # noqa: SIM118
                (count,), (first, *shape) = self._file.get_slice(name).get_shape(), layout.pop(name)
                whole = all(isinstance(number, int) and 0 <= number < 2**63 for number in (first, *shape))
                if not whole or first + count > math.prod(shape):
                    raise ValueError(f"{name!r} lies outside of its tensor")
                self.pieces[name] = (first, count, tuple(shape))
            if layout:
                raise ValueError(f"its header names {min(layout)!r}, which it does not hold")
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{where} is no file of a checkpoint ({error}); {checkpoint.instead}") from error

    def holds(self, name: str, position: int) -> bool:
        first, count, _ = self.pieces.get(name, (0, 0, ()))
        return first <= position < first + count

    def slice(self, name: str, start: int, end: int) -> Tensor:
        values: Tensor = self._file.get_slice(name)[start:end]
        return values
