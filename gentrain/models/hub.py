"""Files of repositories on the Hugging Face hub, fetched once on each node, whatever the number of its processes."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

_TEXTS = ("*.json", "*.txt", "*.model", "*.jinja")  # configurations and what tokenizers read


def files_of(folder: str = "", variant: str | None = None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Patterns, and patterns of what is left out all the same, of what from_pretrained reads of a folder: from safetensors only."""
    within = f"{folder}/" if folder else ""
    tensors = "*.safetensors" if variant is None else f"*.{variant}*.safetensors"
    return tuple(within + each for each in (*_TEXTS, tensors)), (f"{within}*.*.safetensors",) if variant is None else ()


@cache
def fetched(repository: str, revision: str | None, patterns: tuple[str, ...], without: tuple[str, ...] = ()) -> Path:
    """The snapshot of a repository in the hub's cache, with its files whose names match.

    One process of a node asks the hub; those that come meanwhile wait for it, and read what it has fetched. They wait on a lock of the
    kernel's in the cache, which a process that dies gives back: the next one goes on with what is missing.

    Args:
        revision: branch, tag or commit; None = main.

    Raises what huggingface_hub does.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    def snapshot(local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(without),
                local_files_only=local_files_only,
            )
        )

    validate_repo_id(repository)
    if HF_HUB_OFFLINE:  # there is nothing to wait for, and the cache may be read-only
        return snapshot(local_files_only=True)
    key = hashlib.sha256("\n".join((repository, revision or "main", *patterns, "-", *without)).encode()).hexdigest()
    lock, waited = FileLock(Path(HF_HUB_CACHE, ".gentrain", f"{key}.lock"), fallback_to_soft=False), False
    with ExitStack() as stack:
        try:
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(lock.acquire(timeout=0))
            except Timeout:
                waited = True
                stack.enter_context(lock.acquire())
        except OSError:  # the cache is read-only, or its file system has no locks: each process asks for itself
            pass
        if waited:
            with suppress(LocalEntryNotFoundError):  # the other one has died, or could not fetch it
                return snapshot(local_files_only=True)
        return snapshot(local_files_only=False)
