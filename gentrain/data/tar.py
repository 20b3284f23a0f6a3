"""Tar files read where they lie, on disk or in an object store, without unpacking: what is in them, and any stretch of their bytes.

Read strictly: what is no plain file or directory, what does not fit into the archive, and what two readers could take for different things
is refused. Python's tarfile parses single headers; as a whole it passes silently over what is damaged, and allocates what a header claims.
"""

from __future__ import annotations

import os
import stat
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple
from zlib import crc32

STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")  # other protocols of fsspec open what a data set has no need of
BLOCK = 512
_AHEAD = 2**16  # bytes asked of an object store at once while headers are read: several small members, or the header of a large one
_MOST_EXTENSION = 2**20  # bytes of an extended header
_MOST_NAME = 4096  # bytes
_MOST_PADDING = 2**20  # bytes of zeros after the end
_FRESH_S = 60  # for so long what an object store said of an object is believed
_STAMPS = ("size", "ETag", "etag", "LastModified", "last_modified", "updated", "generation", "created")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_KINDS = {
    tarfile.LNKTYPE: "a hard link", tarfile.SYMTYPE: "a symbolic link", tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe", tarfile.GNUTYPE_SPARSE: "a sparse file", tarfile.GNUTYPE_LONGLINK: "a link",
}  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """An archive that is open. size: bytes. stamp: changes when the archive does. read: (start, length) -> exactly these bytes."""

    size: int
    stamp: str
    read: Callable[[int, int], bytes]


class Member(NamedTuple):
    """A file in an archive. header: where the last block before its bytes begins. check: of that block, so that it is known again."""

    name: str
    header: int
    size: int
    check: int


def is_local(archive: str) -> bool:
    return "://" not in archive or archive.startswith("file://")


@contextmanager
def opened(archive: str) -> Iterator[Opened]:
    """Opens a path or an fsspec URL. Raises what the storage raises, and ValueError for what is no file."""
    if not is_local(archive):
        yield _remote(archive, os.getpid(), int(time.monotonic() / _FRESH_S))
        return
    descriptor = os.open(archive.removeprefix("file://"), os.O_RDONLY | os.O_NONBLOCK)  # a pipe is not waited for
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("not a regular file")
        read = _exactly(lambda start, length: os.pread(descriptor, length, start))
        yield Opened(info.st_size, f"{info.st_dev} {info.st_ino} {info.st_size} {info.st_mtime_ns}", read)
    finally:
        os.close(descriptor)


@lru_cache(maxsize=4096)
def _remote(url: str, pid: int, minute: int) -> Opened:
    """pid and minute: a fork must not use its parent's connections, and an object may be replaced."""
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url, use_listings_cache=False)
    info: dict[str, Any] = system.info(path)
    if info["type"] != "file":
        raise ValueError("not a file")
    read = _exactly(lambda start, length: system.cat_file(path, start=start, end=start + length))
    return Opened(info["size"], repr([info.get(key) for key in _STAMPS]), read)


def _exactly(read: Callable[[int, int], bytes]) -> Callable[[int, int], bytes]:
    def exact(start: int, length: int) -> bytes:
        data = read(start, length) if length else b""
        if len(data) != length:
            raise ValueError(f"gave {len(data)} bytes at {start} where it has {length}")
        return data

    return exact


class Ahead:
    """Reads an archive from its beginning to its end, more than is asked for at once."""

    def __init__(self, archive: Opened, at_once: int):
        self.size, self._archive, self._at_once = archive.size, archive, at_once
        self._start, self._data = 0, b""

    def read(self, start: int, length: int) -> bytes:
        if start + length > self.size:
            raise ValueError(f"truncated: it ends at byte {self.size}, where {start + length} are needed")
        if start < self._start or start + length > self._start + len(self._data):
            self._start, self._data = start, self._archive.read(start, min(max(length, self._at_once), self.size - start))
        return self._data[start - self._start : start - self._start + length]


def ahead(archive: Opened, where: str) -> Ahead:
    return Ahead(archive, 8 * BLOCK if is_local(where) else _AHEAD)


def members(archive: Ahead) -> Iterator[Member]:
    """The files of a tar archive, in their order. Raises ValueError, which names the member, for all that is not sound."""
    magic = archive.read(0, min(archive.size, 8))
    for prefix, kind in _COMPRESSED.items():
        if magic.startswith(prefix):
            raise ValueError(f"compressed with {kind}; random access needs a plain tar file: unpack it once")
    at, last, names = 0, "", set[str]()
    while True:
        try:
            found = _next(archive, at)
        except (ValueError, tarfile.HeaderError) as error:
            raise ValueError(f"at byte {at:,}, {f'after {last}' if last else 'the first member'}: {error}") from error
        if found is None:
            return
        member, is_file = found
        if is_file:
            if member.name in names:
                raise ValueError(f"{member.name}: a second member of that name")
            names.add(member.name)
            yield member
        at, last = member.header + BLOCK + _padded(member.size), member.name


def _next(archive: Ahead, at: int) -> tuple[Member, bool] | None:
    """The member that begins at a byte, and whether it is a file or a directory; None at the end of the archive."""
    block = archive.read(at, BLOCK)
    if block == bytes(BLOCK):
        if archive.size - at > _MOST_PADDING or any(archive.read(at, archive.size - at)):
            raise ValueError("more follows the end of the archive")
        return None
    extension: dict[str, str] = {}
    info = _header(block)
    while info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
        at = _extend(extension, info, archive, at)
        block = archive.read(at, BLOCK)
        info = _header(block)
    name = _name(extension.get("path", info.name))
    if info.type in _KINDS:
        raise ValueError(f"{name} is {_KINDS[info.type]}")
    if not (info.isreg() or info.isdir()):
        raise ValueError(f"{name} is no file (type {info.type!r})")
    size = _size(extension.get("size", str(info.size)))
    if size is None or (size and info.isdir()):
        raise ValueError(f"{name} has a size of {extension.get('size', str(info.size))[:40]!a}")
    if size > (left := archive.size - at - BLOCK):
        raise ValueError(f"truncated: {name} claims {size:,} bytes where the archive has {left:,}")
    return Member(name, at, size, crc32(block)), info.isreg()


def _header(block: bytes) -> tarfile.TarInfo:
    return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")


def _extend(extension: dict[str, str], info: tarfile.TarInfo, archive: Ahead, at: int) -> int:
    """Takes in an extended header, which is about the next member only; where that one's own header is."""
    if not 0 <= info.size <= _MOST_EXTENSION:
        raise ValueError(f"an extended header of {info.size:,} bytes; at most {_MOST_EXTENSION:,} are read")
    data = archive.read(at + BLOCK, info.size)
    if info.type == tarfile.GNUTYPE_LONGNAME:
        extension["path"] = os.fsdecode(data.rstrip(b"\0"))
    else:
        records = _records(data)
        if info.type == tarfile.XGLTYPE and not records.keys().isdisjoint({"path", "size"}):
            raise ValueError("one name or size for all members")
        extension |= records
    return at + BLOCK + _padded(info.size)


def _records(data: bytes) -> dict[str, str]:
    """The records of a pax header: each is LENGTH KEY=VALUE and a newline, its length included (POSIX.1-2001, pax)."""
    records, at = {}, 0
    while at < len(data):
        digits, space, _ = data[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = data[at + len(digits) + 1 : at + length]
        key, equals, value = record[:-1].partition(b"=")
        if not (space and equals and key) or length > len(data) - at or record[-1:] != b"\n":
            raise ValueError("a damaged extended header")
        if key.startswith(b"GNU.sparse"):
            raise ValueError("a sparse file")
        records[os.fsdecode(key)] = os.fsdecode(value)
        at += length
    return records


def _name(name: str) -> str:
    """The name without a leading "./". Raises ValueError for one that could mean another place, or a terminal harm."""
    shown = ascii(name[:100])
    if len(os.fsencode(name)) > _MOST_NAME:
        raise ValueError(f"the name {shown}... is longer than {_MOST_NAME} bytes")
    if not name.isprintable():
        raise ValueError(f"the name {shown} cannot be printed")
    name = name.removeprefix("./")
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"the name {shown} leads out of the archive")
    return name


def _size(given: str) -> int | None:
    return int(given) if given.isascii() and given.isdigit() and len(given) < 20 else None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
