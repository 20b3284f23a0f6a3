"""Sends what was exported to the Hugging Face hub. The token comes from the environment alone, and is written nowhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gentrain.config import ConfigError, option

TOKEN = "HF_TOKEN"


@dataclass
class Push:
    """Where a directory goes on the hub."""

    repository: str = option(help="OWNER/NAME, made where it is missing")
    revision: str | None = option(None, "branch that gets the commit, made where it is missing; null = main")
    private: bool = option(
        False, "a repository that is made is seen by its owner alone, not as the account has it; others stay as they are"
    )
    dry_run: bool = option(False, "say what would be sent, and ask nothing of the hub")

    def __post_init__(self) -> None:
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.repository)
        except ValueError as error:
            raise ConfigError(f"{self.repository!r} names no repository: {error}", key="repository") from error
        if self.repository.count("/") != 1:
            raise ConfigError(f"{self.repository!r} does not say whose it is; write OWNER/NAME", key="repository")

    def check(self) -> None:
        """Raises ConfigError where sending is bound to fail: before hours are spent on what is to be sent."""
        from huggingface_hub.constants import HF_HUB_OFFLINE

        if self.dry_run:
            return
        if HF_HUB_OFFLINE:
            raise ConfigError("the hub must not be asked: HF_HUB_OFFLINE is set; unset it, or set dry_run", key="push")
        if not os.environ.get(TOKEN):
            raise ConfigError(f"no token: export {TOKEN}, one that may write (https://huggingface.co/settings/tokens)", key="push")

    def send(self, directory: Path) -> Iterator[str]:
        """Commits the files of `directory`, and tells what it did; a dry run tells what it would have done.

        Raises RuntimeError with the remedy when the hub refuses or cannot be reached. The directory stays complete either way.
        """
        files = {path.relative_to(directory).as_posix(): path.stat().st_size for path in sorted(directory.rglob("*")) if path.is_file()}
        branch = self.revision or "main"
        if self.dry_run:
            new = " (private if it is new)" if self.private else ""
            yield f"would send {len(files)} files, {_size(sum(files.values()))}, to {self.repository}, branch {branch}{new}:"
            yield from (f"  {name}  {_size(size)}" for name, size in files.items())
            return
        self.check()
        from huggingface_hub import HfApi

        api = HfApi(token=os.environ[TOKEN])
        try:
            api.create_repo(self.repository, private=self.private or None, exist_ok=True)
            if self.revision is not None:
                api.create_branch(self.repository, branch=self.revision, exist_ok=True)
            told = f"Upload {directory.name} (gentrain)"
            commit = api.upload_folder(repo_id=self.repository, folder_path=directory, revision=self.revision, commit_message=told)
        except Exception as error:  # its client raises those of whatever library it sends with
            text = " ".join(str(error).replace(os.environ[TOKEN], "***").split())[:300]
            again = f"hf upload {self.repository} {directory}" + (f" --revision {self.revision}" if self.revision else "")
            raise RuntimeError(
                f"{directory} is complete, but {self.repository} did not take it: {text}; once that is mended: {again}"
            ) from None
        yield f"sent {len(files)} files, {_size(sum(files.values()))}: {commit.commit_url}"


def as_repository(card: str, name: str, repository: str) -> str:
    """A model card that tells how to load the directory `name`, for those who load it from the hub."""
    card = card.replace(f"Replace `{name}` by the path of this directory.", f"`{repository}` is this repository.")
    return card.replace(f'"{name}"', f'"{repository}"')


def _size(count: int) -> str:
    units = ("bytes", "kB", "MB", "GB", "TB")
    place = min(len(units) - 1, (len(str(count)) - 1) // 3)
    return f"{count / 1000**place:.3g} {units[place]}"
