"""What every hostile input is held to: little time, little memory, and nothing written or lost where it lies."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from gentrain.training.logs import LOGS

CPU_S = 10.0  # the slowest took 1.1 s on 2 cores of an AMD EPYC
MEMORY = 2**29  # bytes beyond what the process has


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Mode and contents of everything below a folder, but for what a run says of what it refused."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if LOGS not in path.relative_to(folder).parts):
        info = path.lstat()
        what = os.readlink(path) if path.is_symlink() else ""
        if stat.S_ISREG(info.st_mode) and info.st_size < 2**24:
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path)] = (info.st_mode, what)
    return found


@contextmanager
def contained(folder: Path) -> Iterator[None]:
    """Runs the body with 512 MiB more memory than there is in use; afterwards everything below the folder must be as it was."""
    before, started = contents(folder), time.process_time()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - started < CPU_S
    assert contents(folder) == before


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file whose header is what it should not be. length: what it claims to be long."""
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data
