"""What is sent along with a job: named files and a directory, without what is ignored, as a zip that follows from its contents."""

from __future__ import annotations

import io
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from gentrain.config import ConfigError

# Left out of every package: secrets, and what is large and made anew.
ALWAYS_IGNORED = (
    ".git", ".hg", ".svn", ".venv", "venv", "node_modules", "__pycache__", "*.pyc", ".cache", ".*_cache", "runs",
    ".env", ".env.*", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_dsa*", "id_ed25519*", "id_ecdsa*", ".ssh", ".aws", ".netrc",
    ".git-credentials", ".pypirc", ".kube", ".docker",
)  # fmt: skip
MAX_FILES = 10_000
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip can name


def listed(directory: Path, ignore: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """(name, file) of the regular files under a directory. Links are left out: they may point anywhere.

    Args:
        ignore: patterns as in fnmatch, beside ALWAYS_IGNORED; one with a slash is compared with the path below `directory`, another
            one with each part of it.

    Raises ConfigError for a name that cannot be printed.
    """
    patterns = (*ALWAYS_IGNORED, *ignore)

    def ignored(name: str) -> bool:
        last = name.rpartition("/")[2]  # the parts above have been asked about on the way down
        return any(fnmatchcase(name if "/" in pattern else last, pattern.rstrip("/")) for pattern in patterns)

    for folder, folders, files in os.walk(directory):  # which follows no links
        below = Path(folder).relative_to(directory)
        folders[:] = sorted(name for name in folders if not ignored((below / name).as_posix()))
        for file in sorted(files):
            name, path = (below / file).as_posix(), Path(folder, file)
            if ignored(name) or not stat.S_ISREG(path.lstat().st_mode):
                continue
            if not name.isprintable():
                raise ConfigError(f"{name!r} in {directory} is no name to send; rename it", key="cluster.submit")
            yield name, path


def contents(named: Mapping[str, bytes], directory: Path | None, ignore: Sequence[str], limit_mib: int) -> dict[str, bytes]:
    """Name -> bytes of all that goes into a package; what is in `named` goes before what the directory holds.

    Raises ConfigError when the files are more than MAX_FILES or `limit_mib` MiB, naming the largest.
    """
    paths: dict[str, Path] = {}
    total = sum(map(len, named.values()))
    for name, path in () if directory is None else listed(directory, ignore):
        paths[name] = path
        total += path.stat().st_size
        if len(paths) > MAX_FILES:
            raise ConfigError(
                f"{directory} holds more than {MAX_FILES:,} files; ignore some with cluster.submit.ignore", key="cluster.submit"
            )
    if total > limit_mib * 2**20:
        largest = sorted(paths, key=lambda name: paths[name].stat().st_size, reverse=True)[:3]
        raise ConfigError(
            f"{total / 2**20:.1f} MiB are more than {limit_mib}; the largest: {', '.join(largest)}; ignore them, or keep data where the "
            "place can read it",
            key="cluster.submit.size_limit_mib",
        )
    return {name: path.read_bytes() for name, path in paths.items()} | dict(named)


def zipped(files: Mapping[str, bytes]) -> bytes:
    """A zip of them: the same bytes for the same contents, whenever and wherever they were written."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name], zipfile.ZIP_DEFLATED)
    return made.getvalue()
