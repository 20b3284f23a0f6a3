"""Where checkpoints are published: a directory, or an object store behind fsspec.

What has a name is whole at any moment: in a directory a checkpoint gets its name by a rename and loses it by one before it is deleted; in
an object store, which has no rename, its manifest is written last and deleted first. LATEST follows, and only then are older ones deleted.
OWNER says which run publishes there, and which attempt of it did last.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from gentrain.training.checkpoint import MANIFEST, Checkpoint, CheckpointError, refuse_foreign, sha256
from gentrain.training.remedies import StoreError, remedy

log = logging.getLogger(__name__)

T = TypeVar("T")

LATEST = "LATEST"
OWNER = "OWNER"
NAME = re.compile("[0-9]{12}|[1-9][0-9]{12,}")  # of a checkpoint
_TEMPORARY = re.compile(rf"\.(({NAME.pattern})(\.old)?|{LATEST}|{OWNER})\.tmp")


class Storage:
    """Holds the checkpoints of one run. `prepare`, `publish`, `delete` and `discard` are one process's to call, `put` any rank's.

    Attributes:
        where: names it in messages.
    """

    where: str
    _owner: dict[str, str] | None = None  # what `claim` found or wrote
    _signed = False  # whether this attempt has put its name into it

    def latest(self) -> str | None:
        """What LATEST names, None before the first. Raises CheckpointError when that is not there.

        A death between the first checkpoint and LATEST leaves that one alone without it. Where there are more, somebody removed LATEST.
        """
        name, names = self._read(LATEST), self.names()
        if name is not None and name not in names and self._read(LATEST) != name:  # deleted by a run that has published since
            return self.latest()
        if name is None and len(names) > 1:
            raise CheckpointError(
                f"{self.where}/{LATEST} is missing beside {len(names)} checkpoints; write the name of one into it, such as the newest, "
                f"{names[-1]}, or begin anew with another output"
            )
        if name is None and names:
            log.warning("%s/%s is missing; %s is the only checkpoint there, and is taken", self.where, LATEST, names[0])
            return names[0]
        if name is not None and name not in names:
            there = ", ".join(names) or "none"
            raise CheckpointError(f"{self.where}/{LATEST} names {name[:100]!r}, which is not there; write one of these into it: {there}")
        return name

    def owner(self) -> dict[str, str]:
        """Who publishes here: `run`, its identity, `output`, its directory, and `attempt` and `host` of the last one. Empty: nobody yet.

        Raises CheckpointError also when nobody does and something lies there that no run has written: it is not for us to write beside.
        """
        text = self._read(OWNER)
        if text is None:
            stranger = next((name for name in self._entries() if not self._of_a_run(name)), None)
            if stranger is None:
                return {}
            raise CheckpointError(
                f"{self.where} holds {stranger!r}, which no run has written there; name a place of its own, such as {self.where}/run, or "
                "move what is there away",
                key="training.checkpoints",
            )
        try:
            found = dict(json.loads(text))
            if not (isinstance(found["run"], str) and isinstance(found["output"], str)):
                raise ValueError("it names no run")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{self.where}/{OWNER} is damaged ({error}); remove it, if no other run publishes there") from error
        return found

    def _of_a_run(self, name: str) -> bool:
        """Whether something may lie in a place that no run has claimed yet; what begins with a dot may, and is left alone."""
        if NAME.fullmatch(name):
            return self._is_complete(name)
        return name in (LATEST, OWNER, "lost+found") or name.startswith(".")

    def claim(self, run: str, output: str) -> None:
        """From now on `prepare` and `publish` raise CheckpointError when another run, or a later attempt, has taken the place.

        Args:
            run: identity of the run. output: its directory, for messages.
        """
        if not self.owner():
            self._write(OWNER, json.dumps({"run": run, "output": output}))
        self._owner = self.owner()  # another run may have written it at the same time
        if self._owner.get("run") != run:
            raise self._taken(self._owner)
        if (host := self._owner.get("host", socket.gethostname())) != socket.gethostname():
            log.info("%s: the last attempt ran on %s; if it still does, it is refused at its next checkpoint", self.where, host)

    def _refuse_others(self) -> None:
        if self._owner is not None and (found := self.owner()) != self._owner:
            raise self._taken(found)

    def _taken(self, by: dict[str, str]) -> CheckpointError:
        where = " on ".join(filter(None, (by.get("output"), by.get("host"))))
        who = f"the run or a later attempt in {where}" if by else f"somebody who removed {OWNER}"
        return CheckpointError(
            f"{self.where} was taken by {who}; stop one of them, or give each run a place of its own", key="training.checkpoints"
        )

    def _sign(self) -> None:
        """Before anything is changed: says that this attempt publishes now, so that an earlier one that still lives is refused."""
        self._refuse_others()
        if self._owner is not None and not self._signed:
            self._owner, self._signed = self._owner | {"attempt": secrets.token_hex(8), "host": socket.gethostname()}, True
            self._write(OWNER, json.dumps(self._owner))

    def whole(self, but: str) -> list[str]:
        """Names of checkpoints beside `but` whose manifest is sound and whose files are there, the newest first."""
        found = []
        for name in reversed(self.names()):
            if name != but:
                with suppress(CheckpointError, OSError, StoreError), self._open(name, list):
                    found.append(name)
        return found

    def names(self) -> list[str]:
        """Of the published checkpoints, in the order of their samples."""
        raise NotImplementedError

    def open(self, name: str) -> AbstractContextManager[Checkpoint]:
        """A published checkpoint for reading. Raises CheckpointError."""
        return self._open(name, lambda: self.whole(but=name))

    def read_newest(self, read: Callable[[Checkpoint], T]) -> T | None:
        """What `read` makes of the newest checkpoint, and again of a newer one where a run that trains has deleted that one meanwhile.

        None before the first. Raises what `open` and `read` do.
        """
        name = self.latest()
        while name is not None:
            try:
                with self.open(name) as checkpoint:
                    return read(checkpoint)
            except Exception:  # whatever is said of files that go while they are read
                before, name = name, self.latest()
                if name == before:
                    raise
        return None

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
        self.complete(name, manifest)
        self.point(name)

    def complete(self, name: str, manifest: str) -> None:
        """Gives the prepared checkpoint its name. Raises CheckpointError when the place was taken."""
        raise NotImplementedError

    def point(self, name: str) -> None:
        """Gives LATEST the name of a checkpoint that is complete. Raises CheckpointError when the place was taken."""
        self._refuse_others()
        self._write(LATEST, name)

    def discard(self, name: str) -> None:
        """Removes a prepared checkpoint, unless `complete` has begun to show it. Raises CheckpointError when the place was taken."""
        raise NotImplementedError

    def delete(self, name: str) -> None:
        """Removes a published checkpoint. What a failure has left of one that lost its name goes with the next `prepare`."""
        raise NotImplementedError

    def _open(self, name: str, others: Callable[[], list[str]]) -> AbstractContextManager[Checkpoint]:
        raise NotImplementedError

    def _entries(self) -> list[str]:
        """Names of all that lies here, checkpoint or not."""
        raise NotImplementedError

    def _is_complete(self, name: str) -> bool:
        """Whether a manifest is there."""
        raise NotImplementedError

    def _read(self, name: str) -> str | None:
        """Of LATEST or OWNER; None where it is not there."""
        raise NotImplementedError

    def _write(self, name: str, text: str) -> None:
        raise NotImplementedError


class LocalStorage(Storage):
    """A directory. Files and directories are synced before they are named; other users may read, not write them."""

    def __init__(self, root: Path):
        self.root, self.where = root, str(root)

    def _read(self, name: str) -> str | None:
        try:
            with open(self.root / name, "rb", opener=_at_once) as file:
                return (file.read(10_000) or b"").decode(errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            what = remedy(error.errno) or "mend that"
            raise CheckpointError(f"{self.root / name} cannot be read ({error.strerror}): {what}") from error

    def _write(self, name: str, text: str) -> None:
        self.root.mkdir(0o755, parents=True, exist_ok=True)
        replace_file(self.root / name, text + "\n")

    def names(self) -> list[str]:
        return sorted((name for name in self._entries() if NAME.fullmatch(name) and (self.root / name).is_dir()), key=int)

    def _entries(self) -> list[str]:
        return sorted(os.listdir(self.root)) if self.root.is_dir() else []

    def _is_complete(self, name: str) -> bool:
        return (self.root / name / MANIFEST).exists()

    @contextmanager
    def _open(self, name: str, others: Callable[[], list[str]]) -> Iterator[Checkpoint]:
        directory = self.root / name
        refuse_foreign(self.root.resolve())
        refuse_foreign(directory)

        def fetch(file: str) -> Path:
            refuse_foreign(directory / file)
            return directory / file

        yield Checkpoint(self.where, name, os.listdir(directory), fetch, others)

    def sweep(self) -> None:
        if self.root.is_dir():
            refuse_foreign(self.root.resolve())
        for path in (self.root / name for name in self._entries() if _TEMPORARY.fullmatch(name)):
            self._sign()
            try:
                _remove(path)
            except OSError as error:  # such as a file that is still open somewhere on NFS
                log.warning("%s, which is no checkpoint, could not be removed and stays for now: %s", path, error)

    def prepare(self, name: str) -> None:
        self._sign()
        self.root.mkdir(0o755, parents=True, exist_ok=True)
        self.sweep()
        self._unpublished(name).mkdir(0o755)

    def put(self, name: str, file: str, write: Callable[[Path], object]) -> str:
        path = self._unpublished(name) / file
        write(path)
        path.chmod(path.stat().st_mode & 0o755)
        _sync(path)
        return sha256(path)

    def complete(self, name: str, manifest: str) -> None:
        self._refuse_others()
        self.put(name, MANIFEST, lambda path: path.write_text(manifest))
        _sync(self._unpublished(name))
        if (self.root / name).exists():  # published by an attempt that died before it could say so in LATEST
            self.delete(name)
        self._unpublished(name).rename(self.root / name)
        _sync(self.root)

    def discard(self, name: str) -> None:
        self._refuse_others()
        shutil.rmtree(self._unpublished(name), ignore_errors=True)

    def delete(self, name: str) -> None:
        nameless = self.root / f".{name}.old.tmp"
        (self.root / name).rename(nameless)
        _sync(self.root)
        _remove(nameless)

    def _unpublished(self, name: str) -> Path:
        return self.root / f".{name}.tmp"


def _remove(path: Path) -> None:
    """A directory with all in it, a file, or of a link the link alone: somebody has moved a checkpoint elsewhere, and wants it."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def replace_file(path: Path, text: str) -> None:
    """Writes a file as a whole: whenever the process or the machine dies, the former contents or the new ones are there."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _at_once(path: str, flags: int) -> int:
    """Opens a file, and a pipe without waiting for somebody to write into it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
