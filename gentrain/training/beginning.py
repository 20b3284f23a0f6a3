"""What is looked at before a run begins or goes on: that nothing is in its way, that its checkpoints have a place of their own, and that
they are there and of its settings.

The run's directory holds its identity and where its checkpoints are; beside those OWNER holds the same identity.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from gentrain.config import ConfigError, Document, build, to_dict
from gentrain.training.checkpoint import STATE, CheckpointError
from gentrain.training.logs import LOGS
from gentrain.training.object_storage import open_storage
from gentrain.training.remedies import StoreError
from gentrain.training.run import (
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    SAMPLES,
    RunConfig,
    open_run,
)
from gentrain.training.settings import changes, weight_settings
from gentrain.training.storage import LATEST, OWNER, LocalStorage, Storage, replace_file
from gentrain.training.trackers import TENSORBOARD
from gentrain.training.watchdog import STACKS

IDENTITY = "identity.json"
# What may be another from a checkpoint on: engines, whose state is float32 masters by name, and what a step is made of or told to be.
_MAY_CHANGE = re.compile(r"(roles\.[^.]+\.)?(engine(\..+)?|placement|schedule(\..+)?|optimizer\.lr)|sampler(\..+)?|training\.micro_batches")


@dataclass
class Changed:
    """What of the settings that weights depend on differs from the checkpoint that a run goes on from.

    Attributes:
        samples: seen in the checkpoint. settings: dotted key -> its value there and now; None where there is no such key.
    """

    samples: int = 0
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        said = [f"{key}: {json.dumps(before)} -> {json.dumps(now)}" for key, (before, now) in self.settings.items()]
        return f"from sample {self.samples:,} on with other settings: {', '.join(said)}"


def refuse_wrong_start(run: RunConfig, files: Iterable[str]) -> Changed:
    """Raises ConfigError for what a person has to mend before the run may begin or go on. Changes nothing.

    Args:
        files: further names of files that will be written into the run's directory.

    Returns:
        what has changed since the checkpoint that the run goes on from, and may.
    """
    storage = run.storage
    _refuse_in_the_way(run, storage, files)
    _refuse_other_place(run, storage)
    changed = _refuse_other_settings(run, storage)
    _refuse_fewer_samples(run, storage, changed)
    return changed


def claim(run: RunConfig, storage: Storage) -> None:
    """Makes the place of the checkpoints this run's. Raises ConfigError when it is another's."""
    _refuse_other_place(run, storage)
    mine = _identity(run)
    if not mine:  # a new run, or one whose directory did not outlive its node
        mine = {"run": storage.owner().get("run") or secrets.token_hex(8)}
        replace_file(run.directory / IDENTITY, json.dumps(mine))
    storage.claim(mine["run"], str(run.directory.resolve()))
    if (newest := storage.latest()) is not None:
        note_published(run, newest)


def identity_of(run: RunConfig) -> str:
    """What no other run has; empty where none was claimed."""
    return str(_identity(run).get("run", ""))


def note_published(run: RunConfig, newest: str) -> None:
    """Writes down where checkpoints of this run are and how far the newest is, so that it never begins anew, or goes back, because another
    place is named."""
    mine = _identity(run)
    if mine and (now := mine | {"checkpoints": _place(run), "published": int(newest)}) != mine:
        replace_file(run.directory / IDENTITY, json.dumps(now))


def _place(run: RunConfig) -> str:
    """Empty for the one in the run's directory, which may be moved."""
    storage = run.storage
    if run.training.checkpoints is None:
        return ""
    return str(storage.root.resolve()) if isinstance(storage, LocalStorage) else storage.where


def _identity(run: RunConfig) -> dict[str, Any]:
    """run: who it is. Once something was published: checkpoints: where (see `_place`), published: samples of the newest."""
    path = run.directory / IDENTITY
    try:
        found = dict(json.loads(path.read_text()))
        if not isinstance(found["run"], str) or not isinstance(found.get("checkpoints", ""), str):
            raise ValueError("it names no run")
        if not isinstance(found.get("published", 0), int):
            raise ValueError(f"published: {found['published']!r:.100}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}); remove it: with training.checkpoints as it was, it is made anew", key="output"
        ) from error
    return found


def _refuse_in_the_way(run: RunConfig, storage: Storage, files: Iterable[str]) -> None:
    wanted = {run.directory / name: False for name in (METRICS, CONFIG, ENVIRONMENT, IDENTITY, *files)}
    wanted |= {run.directory / name: True for name in (TENSORBOARD, SAMPLES, LOGS, STACKS)}
    if isinstance(storage, LocalStorage):
        wanted |= {storage.root: True, storage.root / LATEST: False, storage.root / OWNER: False}
    for path, directory in wanted.items():
        if path.exists() and not (path.is_dir() if directory else path.is_file()):
            kind = "directory" if directory else "file"
            key = "training.checkpoints" if run.training.checkpoints and not path.is_relative_to(run.directory) else "output"
            raise ConfigError(f"{path} is in the way, where a {kind} has to be written; move it away, or choose another place", key=key)


def _refuse_other_place(run: RunConfig, storage: Storage) -> None:
    """Raises ConfigError when the place is another run's, or holds none of the checkpoints that this run has published."""
    key = "output" if run.training.checkpoints is None else "training.checkpoints"
    mine, owner = _identity(run), storage.owner()
    if owner and (owner["run"] != mine["run"] if mine else owner["output"] != str(run.directory.resolve())):
        raise ConfigError(
            f"{storage.where} holds the checkpoints of another run, that of {owner['output']}; name another place, or remove "
            f"{storage.where}/{OWNER} if that run is given up, or was this one under another path",
            key=key,
        )
    if not mine and not storage.names() and (seen := _samples_seen(run)) > 0:
        raise ConfigError(
            f"{run.directory} has seen {seen:,} samples by its {METRICS}, and {storage.where} holds no checkpoint of it; restore them and "
            f"{IDENTITY}, name their place with training.checkpoints, or begin anew with another output",
            key=key,
        )
    if "checkpoints" not in mine:
        return
    own = str((run.directory / CHECKPOINTS).resolve())
    before = mine["checkpoints"] or own
    if before == (_place(run) or own):
        if storage.names():
            return  # which of them is for LATEST to say
        raise ConfigError(
            f"{storage.where} holds none of the checkpoints that this run has published; restore them, or begin anew with another output",
            key=key,
        )
    published, newest = max(mine.get("published", 0), _newest(before, run)), storage.latest()
    if newest is None or int(newest) < published:
        found = "none of them" if newest is None else f"none beyond {int(newest):,}"
        raise ConfigError(
            f"the checkpoints of this run are in {mine['checkpoints'] or run.directory / CHECKPOINTS}, up to {published:,} samples, and "
            f"{storage.where} holds {found}; set it back, or copy them there",
            key="training.checkpoints",
        )


def _samples_seen(run: RunConfig) -> int:
    """The most that a line of metrics tells."""
    with suppress(OSError):
        return max((int(samples_of(line) or 0) for line in (run.directory / METRICS).read_text(errors="replace").splitlines()), default=0)
    return 0


def samples_of(line: str) -> float | None:
    """Of a line of metrics; None for one that is damaged."""
    try:
        samples = float(json.loads(line)["samples"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None
    return samples if math.isfinite(samples) else None


def _newest(place: str, run: RunConfig) -> int:
    """Samples of the newest checkpoint in a former place; 0 where it cannot be reached. A kill may have left it ahead of IDENTITY."""
    with suppress(ConfigError, StoreError, OSError):
        return int(open_storage(place, run.directory).latest() or 0)
    return 0


def _refuse_other_settings(run: RunConfig, storage: Storage) -> Changed:
    """Raises ConfigError when the newest checkpoint is one of other settings than those that may change."""
    name = storage.latest()
    if name is None:
        return Changed()
    with storage.open(name) as checkpoint:
        saved, where = checkpoint.state.get("settings"), checkpoint.where
        if not isinstance(saved, dict | None):
            raise CheckpointError(f"{where}/{STATE} is damaged (settings: {saved!r:.100}); {checkpoint.instead}")
    if saved is not None:
        former = build(RunConfig, Document(saved, where))
    elif (run.directory / CONFIG).is_file():
        former = open_run(run.directory)
    else:
        return Changed()
    found = changes(_written_out(former, run), _written_out(run, former))
    found.pop("training.samples", None)
    refused = [key for key in found if not _MAY_CHANGE.fullmatch(key)]
    if refused:
        raise ConfigError(
            f"{run.directory} holds a run with another {', '.join(refused[:5])}; name another directory with output=..., "
            "or move that one away",
            key="output",
        )
    return Changed(int(name), found)


def _written_out(run: RunConfig, other: RunConfig) -> dict[str, Any]:
    """What weights depend on, with what a role takes from the run as a whole named for the role where it is in `other`."""
    values = weight_settings(run)
    for role in {*run.roles, *other.roles}:
        values["roles"][role] = own = to_dict(run.role_settings(role))
        theirs = other.role_settings(role)
        if theirs.engine is not None:
            own["engine"] = to_dict(run.engine_of(role))
        if theirs.optimizer is not None:
            own["optimizer"] = to_dict(run.role_settings(role).optimizer or run.optimizer)  # as written, for whatever batch
        if theirs.schedule is not None:
            own["schedule"] = to_dict(run.schedule_of(role))
    return values


def _refuse_fewer_samples(run: RunConfig, storage: Storage, changed: Changed) -> None:
    """Raises ConfigError when the run has gone further than it is asked to, since its weights are not those of so few samples, and when
    nothing is left that could be trained with other settings."""
    name, training = storage.latest(), run.training
    if name is not None and int(name) - training.batch_size >= training.samples:
        raise ConfigError(
            f"{run.directory} has seen {int(name):,} samples already, more than {training.samples:,}; raise it to go on, or name another "
            "directory with output=... to train so few",
            key="training.samples",
        )
    if changed.settings and int(name or 0) >= training.samples:
        raise ConfigError(
            f"{run.directory} has seen its {training.samples:,} samples, so that another {', '.join(list(changed.settings)[:5])} would "
            "change nothing; raise it to go on, or set that back",
            key="training.samples",
        )
