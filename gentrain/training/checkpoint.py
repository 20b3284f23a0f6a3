"""Checkpoints that are whole or absent.

A checkpoint is written to a temporary directory, every file is hashed into a manifest and synced, the directory is renamed into place,
LATEST is replaced, and only then are older ones deleted. What is read is verified against the manifest first; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"
STATE = "state.json"
LATEST = "LATEST"
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that must not be read. The message names the file and the remedy."""


def publish(root: Path, samples: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep_last: int) -> Path:
    """Publishes a checkpoint under `root` and deletes all but the newest `keep_last`. One process calls it.

    Args:
        tensors: file stem -> name -> tensor; each becomes a safetensors file.
        state: what is not a tensor; becomes state.json.
    """
    name = f"{samples:012d}"
    root.mkdir(parents=True, exist_ok=True)
    remove_unpublished(root)
    temporary = root / f".{name}.tmp"
    temporary.mkdir()
    for stem, values in tensors.items():
        save_file({key: value.contiguous() for key, value in values.items()}, temporary / f"{stem}.safetensors")
    (temporary / STATE).write_text(json.dumps(dict(state), indent=1))
    hashes = {path.name: _hash(path) for path in sorted(temporary.iterdir())}
    (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "samples": samples, "sha256": hashes}, indent=1))
    for path in temporary.iterdir():
        _sync(path)
    _sync(temporary)
    final = root / name
    if final.exists():  # published by an attempt that died before it could say so in LATEST
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(root)
    pointer = root / f".{LATEST}.tmp"
    pointer.write_text(name + "\n")
    _sync(pointer)
    pointer.rename(root / LATEST)
    _sync(root)
    for old in _published(root)[:-keep_last]:
        if old != final:
            shutil.rmtree(old)
    return final


def latest(root: Path) -> Path | None:
    """The checkpoint that LATEST names, None before the first. Raises CheckpointError when it names one that is not there."""
    try:
        name = (root / LATEST).read_text().strip()
    except FileNotFoundError:
        return None
    if not name.isdigit() or not (root / name).is_dir():
        there = ", ".join(path.name for path in _published(root)) or "none"
        raise CheckpointError(f"{root / LATEST} names {name!r}, which is not there; write one of these into it: {there}")
    return root / name


def verify(checkpoint: Path) -> dict[str, Any]:
    """The state.json of a checkpoint whose every file has the hash in its manifest. Raises CheckpointError naming the file."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        hashes, version = dict(manifest["sha256"]), manifest["format"]
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} was never published: it has no {MANIFEST}; resume from another one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST} is damaged ({error}); resume from another one") from error
    if version != FORMAT:
        raise CheckpointError(f"{checkpoint} has format {version}, this version reads {FORMAT}; use the version that wrote it")
    extra = {path.name for path in checkpoint.iterdir()} - set(hashes) - {MANIFEST}
    if extra:
        raise CheckpointError(f"{checkpoint / min(extra)} is not in the manifest; remove it or resume from another checkpoint")
    for name, expected in hashes.items():
        path = checkpoint / name
        if Path(name).name != name or not path.is_file() or path.is_symlink():
            raise CheckpointError(f"{path} is missing or not a file of its own; resume from another checkpoint")
        if _hash(path) != expected:
            raise CheckpointError(f"{path} differs from its hash in the manifest; resume from another checkpoint")
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    return state


def load_tensors(checkpoint: Path, stem: str) -> dict[str, Tensor]:
    """The tensors published under `stem`. Call `verify` first."""
    tensors: dict[str, Tensor] = load_file(checkpoint / f"{stem}.safetensors")
    return tensors


def remove_unpublished(root: Path) -> None:
    """Deletes what a writer that died has left behind."""
    for path in root.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _published(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.name.isdigit() and path.is_dir())


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
