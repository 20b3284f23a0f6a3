"""Where checkpoints are published: a directory, or an object store behind fsspec.

What has a name is whole at any moment: in a directory a checkpoint gets its name by a rename and loses it by one before it is deleted; in
an object store, which has no rename, its manifest is written last and deleted first. LATEST follows, and only then are older ones deleted.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from gentrain.config import ConfigError
from gentrain.training.checkpoint import MANIFEST, Checkpoint, CheckpointError, refuse_foreign, sha256

LATEST = "LATEST"
_TRANSFER = ".transfer-"


class Storage:
    """Holds the checkpoints of one run. `prepare`, `publish`, `delete` and `discard` are one process's to call, `put` any rank's.

    Attributes:
        where: names it in messages.
    """

    where: str

    def latest(self) -> str | None:
        """What LATEST names, None before the first. Raises CheckpointError when that is not there."""
        name = self._pointer()
        if name is None:
            return None
        names = self.names()
        if name not in names:
            there = ", ".join(names) or "none"
            raise CheckpointError(f"{self.where}/{LATEST} names {name!r}, which is not there; write one of these into it: {there}")
        return name

    def names(self) -> list[str]:
        """Of the published checkpoints, in the order of their samples."""
        raise NotImplementedError

    def open(self, name: str) -> AbstractContextManager[Checkpoint]:
        """A published checkpoint for reading. Raises CheckpointError."""
        raise NotImplementedError

    def sweep(self) -> None:
        """Removes what writers and readers that died have left. Raises CheckpointError where other users may write."""
        raise NotImplementedError

    def prepare(self, name: str) -> None:
        """Makes room for a checkpoint that is about to be written."""
        raise NotImplementedError

    def put(self, name: str, file: str, write: Callable[[Path], object]) -> str:
        """Has `write` make a file of the checkpoint that was prepared; its SHA-256."""
        raise NotImplementedError

    def publish(self, name: str, manifest: str) -> None:
        """Gives the prepared checkpoint its name, and LATEST that name."""
        raise NotImplementedError

    def discard(self, name: str) -> None:
        """Removes a prepared checkpoint."""
        raise NotImplementedError

    def delete(self, name: str) -> None:
        """Removes a published checkpoint."""
        raise NotImplementedError

    def _pointer(self) -> str | None:
        raise NotImplementedError


class LocalStorage(Storage):
    """A directory. Files and directories are synced before they are named; other users may read, not write them."""

    def __init__(self, root: Path):
        self.root, self.where = root, str(root)

    def _pointer(self) -> str | None:
        try:
            return (self.root / LATEST).read_bytes()[:100].decode(errors="replace").strip()
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted((path.name for path in self.root.iterdir() if path.name.isdigit() and path.is_dir()), key=int)

    @contextmanager
    def open(self, name: str) -> Iterator[Checkpoint]:
        directory = self.root / name
        refuse_foreign(self.root.resolve())
        refuse_foreign(directory)

        def fetch(file: str) -> Path:
            refuse_foreign(directory / file)
            return directory / file

        yield Checkpoint(str(directory), os.listdir(directory), fetch)

    def sweep(self) -> None:
        if self.root.is_dir():
            refuse_foreign(self.root.resolve())
        for path in self.root.glob(".*.tmp"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def prepare(self, name: str) -> None:
        self.root.mkdir(0o755, parents=True, exist_ok=True)
        self.sweep()
        self._unpublished(name).mkdir(0o755)

    def put(self, name: str, file: str, write: Callable[[Path], object]) -> str:
        path = self._unpublished(name) / file
        write(path)
        path.chmod(path.stat().st_mode & 0o755)
        _sync(path)
        return sha256(path)

    def publish(self, name: str, manifest: str) -> None:
        self.put(name, MANIFEST, lambda path: path.write_text(manifest))
        _sync(self._unpublished(name))
        if (self.root / name).exists():  # published by an attempt that died before it could say so in LATEST
            self.delete(name)
        self._unpublished(name).rename(self.root / name)
        _sync(self.root)
        pointer = self.root / f".{LATEST}.tmp"
        pointer.write_text(name + "\n")
        _sync(pointer)
        pointer.rename(self.root / LATEST)
        _sync(self.root)

    def discard(self, name: str) -> None:
        shutil.rmtree(self._unpublished(name), ignore_errors=True)

    def delete(self, name: str) -> None:
        nameless = self.root / f".{name}.old.tmp"
        (self.root / name).rename(nameless)
        _sync(self.root)
        shutil.rmtree(nameless)

    def _unpublished(self, name: str) -> Path:
        return self.root / f".{name}.tmp"


class ObjectStorage(Storage):
    """A prefix of an object store. Files pass through a directory in `scratch`, or in the system's where that cannot be written."""

    def __init__(self, url: str, scratch: Path):
        from fsspec.core import url_to_fs

        self.where, self._scratch = url.rstrip("/"), scratch
        self._fs, root = url_to_fs(url, use_listings_cache=False)  # another process may have published since
        self._root = root.rstrip("/")

    def _pointer(self) -> str | None:
        try:
            return bytes(self._fs.cat_file(f"{self._root}/{LATEST}")).decode().strip()
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        return [name for name, files in self._found().items() if MANIFEST in files]

    @contextmanager
    def open(self, name: str) -> Iterator[Checkpoint]:
        with self._transfer() as directory:

            def fetch(file: str) -> Path:
                try:
                    self._fs.get_file(f"{self._root}/{name}/{file}", str(directory / file))
                except FileNotFoundError:
                    raise CheckpointError(f"{self.where}/{name}/{file} is missing; write another one's name into LATEST") from None
                return directory / file

            yield Checkpoint(f"{self.where}/{name}", self._found().get(name, ()), fetch)

    def sweep(self) -> None:
        for name, files in self._found().items():
            if MANIFEST not in files:
                self._fs.rm(f"{self._root}/{name}", recursive=True)
        for left in self._scratch.glob(f"{_TRANSFER}*"):
            shutil.rmtree(left)

    def prepare(self, name: str) -> None:
        if name in self.names():  # published by an attempt that died before it could say so in LATEST
            self.delete(name)
        self.discard(name)

    def put(self, name: str, file: str, write: Callable[[Path], object]) -> str:
        with self._transfer() as directory:
            path = directory / file
            write(path)
            self._fs.put_file(str(path), f"{self._root}/{name}/{file}")
            return sha256(path)

    def publish(self, name: str, manifest: str) -> None:
        self._fs.pipe_file(f"{self._root}/{name}/{MANIFEST}", manifest.encode())
        self._fs.pipe_file(f"{self._root}/{LATEST}", name.encode())

    def discard(self, name: str) -> None:
        if name in self._found():
            self._fs.rm(f"{self._root}/{name}", recursive=True)

    def delete(self, name: str) -> None:
        self._fs.rm_file(f"{self._root}/{name}/{MANIFEST}")
        self.discard(name)

    def _found(self) -> dict[str, set[str]]:
        """Name -> files, published or not, in the order of their samples."""
        found: dict[str, set[str]] = {}
        try:
            paths = self._fs.find(self._root)
        except FileNotFoundError:
            paths = []
        for path in paths:
            name, _, file = path.removeprefix(f"{self._root}/").partition("/")
            if name.isdigit():
                found.setdefault(name, set()).add(file)
        return dict(sorted(found.items(), key=lambda item: int(item[0])))

    @contextmanager
    def _transfer(self) -> Iterator[Path]:
        parent = self._scratch if os.access(self._scratch, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix=_TRANSFER, dir=parent) as directory:
            yield Path(directory)


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def open_storage(url: str, scratch: Path) -> Storage:
    """The storage that a path or an fsspec URL names. scratch: see ObjectStorage."""
    return LocalStorage(Path(url.removeprefix("file://"))) if is_local(url) else ObjectStorage(url, scratch)


def check_storage(url: str, key: str) -> None:
    """Raises ConfigError, about `key`, when nothing installed serves the URL. Opens nothing."""
    import fsspec

    if is_local(url):
        return
    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        extra = "; pip install 'gentrain[s3]' serves s3://" if protocol.startswith("s3") else ""
        raise ConfigError(f"checkpoints cannot be kept at {url}: {error}{extra}", key=key) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
