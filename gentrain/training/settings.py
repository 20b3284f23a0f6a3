"""Configurations as plain values: what weights depend on, and where two of them differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gentrain.config import to_dict
from gentrain.training.run import RunConfig


def weight_settings(run: RunConfig) -> dict[str, Any]:
    """What a run's weights depend on: not where it runs and lies, nor what is logged."""
    values: dict[str, Any] = to_dict(run)
    for key in ("cluster", "output", "plugins", "trackers"):
        del values[key]
    for key in (
        "log_every",
        "checkpoint_every",
        "checkpoints",
        "async_checkpoints",
        "keep_last",
        "keep_every",
        "keep_best",
        "best_is",
        "preview_every",
        "preview_count",
        "data_workers",
        "hang_timeout_s",
        "max_corrupt",
        "max_skipped",
        "spike_guard",
        "recompute",
        "compile",
        "profile",
    ):
        del values["training"][key]
    return values


def changes(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """The dotted keys, sorted, at which two plain configurations differ, with both values; None for one that lacks the key."""
    a, b = _flat(before), _flat(after)
    return {key: (a.get(key), b.get(key)) for key in sorted({*a, *b}) if (key in a) != (key in b) or a.get(key) != b.get(key)}


def changed_keys(before: Any, after: Any) -> list[str]:
    """The dotted keys at which two plain configurations differ, sorted."""
    return list(changes(before, after))


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    if isinstance(values, Mapping):
        return {k: v for name, value in values.items() for k, v in _flat(value, f"{key}.{name}" if key else str(name)).items()}
    return {key: values}
