"""Checkpoints in an object store behind fsspec, and what a configured place is: a directory or a URL."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gentrain.config import ConfigError
from gentrain.training.checkpoint import MANIFEST, Checkpoint, CheckpointError, sha256
from gentrain.training.remedies import StoreError, has_secret, refuse_mistaken, store_error, without_secrets
from gentrain.training.storage import NAME, LocalStorage, Storage

log = logging.getLogger(__name__)

_TRANSFER = ".transfer-"


class ObjectStorage(Storage):
    """A prefix of an object store. Files pass through a directory in `scratch`, or in the system's where that cannot be written.

    Every method raises StoreError when the store cannot be used.
    """

    def __init__(self, url: str, scratch: Path):
        from fsspec.core import url_to_fs

        self.where, self._scratch = without_secrets(url.rstrip("/")), scratch
        with self._calling():
            self._fs, root = url_to_fs(url, use_listings_cache=False)  # another process may have published since
        self._root = root.rstrip("/")
        self._completing: str | None = None

    def _read(self, name: str) -> str | None:
        try:
            with self._calling():
                return bytes(self._fs.cat_file(f"{self._root}/{name}")).decode(errors="replace").strip()
        except FileNotFoundError:
            return None

    def _write(self, name: str, text: str) -> None:
        with self._writing():
            self._fs.pipe_file(f"{self._root}/{name}", text.encode())

    def names(self) -> list[str]:
        return [name for name, files in self._found().items() if MANIFEST in files]

    def _entries(self) -> list[str]:
        try:
            with self._calling():
                paths = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        return sorted(filter(None, (path.rstrip("/").removeprefix(self._root).strip("/") for path in paths)))

    def _is_complete(self, name: str) -> bool:
        with self._calling():
            return bool(self._fs.exists(f"{self._root}/{name}/{MANIFEST}"))

    @contextmanager
    def _open(self, name: str, others: Callable[[], list[str]]) -> Iterator[Checkpoint]:
        with self._transfer() as directory:

            def fetch(file: str) -> Path:
                try:
                    with self._calling():
                        self._fs.get_file(f"{self._root}/{name}/{file}", str(directory / file))
                except FileNotFoundError:
                    raise CheckpointError(f"{self.where}/{name}/{file} is missing; write another one's name into LATEST") from None
                return directory / file

            yield Checkpoint(self.where, name, self._found().get(name, ()), fetch, others)

    def sweep(self) -> None:
        self._remove_nameless()
        for left in self._scratch.glob(f"{_TRANSFER}*"):
            shutil.rmtree(left)

    def prepare(self, name: str) -> None:
        self._sign()
        self._completing = None
        if name in self.names():  # published by an attempt that died before it could say so in LATEST
            self.delete(name)
        self._remove(name)
        self._remove_nameless()

    def _remove_nameless(self) -> None:
        """What has no manifest: parts of an upload, or of a deletion, that did not come to its end."""
        for name, files in self._found().items():
            if MANIFEST not in files:
                self._sign()
                try:
                    self._remove(name)
                except StoreError as error:
                    log.warning("%s/%s, which is no checkpoint, could not be removed and stays for now: %s", self.where, name, error)

    def put(self, name: str, file: str, write: Callable[[Path], object]) -> str:
        with self._transfer() as directory:
            path = directory / file
            write(path)
            with self._writing():
                self._fs.put_file(str(path), f"{self._root}/{name}/{file}")
            return sha256(path)

    def complete(self, name: str, manifest: str) -> None:
        self._refuse_others()
        self._completing = name  # a call that fails may have done its work all the same, or do it yet
        self._write(f"{name}/{MANIFEST}", manifest)

    def discard(self, name: str) -> None:
        if name != self._completing:
            self._remove(name)

    def delete(self, name: str) -> None:
        with self._writing():
            self._fs.rm_file(f"{self._root}/{name}/{MANIFEST}")
        self._remove(name)

    def _remove(self, name: str) -> None:
        self._refuse_others()  # it may be theirs by now
        if name in self._found():
            with self._writing():
                self._fs.rm(f"{self._root}/{name}", recursive=True)

    def _found(self) -> dict[str, set[str]]:
        """Name -> files, published or not, in the order of their samples."""
        found: dict[str, set[str]] = {}
        try:
            with self._calling():
                paths = self._fs.find(self._root)
        except FileNotFoundError:
            paths = []
        for path in paths:
            name, _, file = path.removeprefix(f"{self._root}/").partition("/")
            if NAME.fullmatch(name):
                found.setdefault(name, set()).add(file)
        return dict(sorted(found.items(), key=lambda item: int(item[0])))

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Tells what the store's library raises; only FileNotFoundError passes, which says of a reader that nothing is there yet."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            raise store_error(self.where, error) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with self._calling():
                yield
        except FileNotFoundError as error:
            raise store_error(self.where, error) from error

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
    """Raises ConfigError, about `key`, when nothing installed serves the URL, it holds a secret, or a path looks like one. Opens
    nothing."""
    import fsspec

    if is_local(url):
        return refuse_mistaken(url.removeprefix("file://"), key)
    if has_secret(url):
        raise ConfigError(
            f"{without_secrets(url)} holds a secret, which saved configurations and messages would show; leave it out and give it in the "
            "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...)",
            key=key,
        )
    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        extra = "; pip install 'gentrain[s3]' serves s3://" if protocol.startswith("s3") else ""
        raise ConfigError(f"checkpoints cannot be kept at {url}: {error}{extra}", key=key) from error
