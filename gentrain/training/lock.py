"""One process per directory: a lock that the kernel frees when its holder dies, with the holder's name beside it."""

from __future__ import annotations

import errno
import getpass
import json
import logging
import os
import re
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from gentrain.config import ConfigError
from gentrain.report import duration
from gentrain.training.remedies import remedy

log = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def cannot_write(directory: Path, error: OSError) -> ConfigError:
    """What to tell about an OSError of the run's directory."""
    what = remedy(error.errno) or "correct the path"
    return ConfigError(f"{directory} cannot be written ({error.strerror or error}): {what}, or choose another directory", key="output")


@contextmanager
def hold(directory: Path, name: str = "run", wait_s: float = 0.0) -> Iterator[None]:
    """Holds the lock `name` of a directory, which is made if need be, while the body runs.

    The kernel keeps it (flock): any death of the holder frees it, nothing stale can block, and no clocks are compared. Where the file
    system has no locks, a warning says that nothing guards the directory.

    Args:
        wait_s: how long to wait for another holder to end.

    Raises:
        ConfigError: another process holds it; the message has its host, pid, user, command and the time since. Or it cannot be written.
    """
    path, owner = directory / f".{name}.lock", directory / f".{name}.owner"
    with ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path, fallback_to_soft=False)
            lock.acquire(timeout=wait_s, poll_interval=0.1)
            stack.callback(lock.release)
            stack.callback(_remove, owner)
            owner.write_text(json.dumps(_myself()))
        except Timeout:
            raise ConfigError(
                f"{directory} is in use by {_describe(path, owner)}; wait for it, stop it, or choose another directory", key="output"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise cannot_write(directory, error) from error
            log.warning("the file system of %s has no locks: make sure that nothing else writes there", directory)
        yield


def _remove(owner: Path) -> None:
    with suppress(OSError):  # what is in its way was told before
        owner.unlink()


def _myself() -> dict[str, str | int]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = str(os.getuid())
    return {"host": socket.gethostname(), "pid": os.getpid(), "user": user, "command": _command()}


def _command() -> str:
    """The command line without values: the file outlives a process that is killed, and an override may hold what it should not."""
    return shlex.join(re.sub("=.*", "=...", each, flags=re.DOTALL) for each in sys.argv)[:200]


def _describe(lock: Path, owner: Path) -> str:
    """The holder in words. Its age is the difference of two times that the file system gave, so that clocks of hosts do not matter."""
    try:
        who = json.loads(owner.read_text())
        os.utime(lock)
        age = duration(max(0.0, lock.stat().st_mtime - owner.stat().st_mtime))
        said = f"pid {who['pid']} of {who['user']} on {who['host']} since {age} ({who['command']})"
        return said if said.isprintable() else ascii(said)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process, which has not said its name yet"
