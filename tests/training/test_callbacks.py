"""When callbacks are due, what they write."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gentrain.methods.base import Clock
from gentrain.training import callbacks
from gentrain.training.callbacks import MetricsFile, Previews, due
from gentrain.training.loop import train
from gentrain.training.world import World
from tests.distributed.cases import run_of, values

ALONE = World(0, 1, torch.device("cpu"))


def test_due_once_per_multiple_whatever_the_batch() -> None:
    assert [samples for samples in range(12, 97, 12) if due(Clock(samples, 12, 96), 30)] == [36, 60, 96]
    assert [samples for samples in range(12, 37, 12) if due(Clock(samples, 12, 36), 5)] == [12, 24, 36]
    assert not due(Clock(12, 12, 12), 0)


def test_previews_draw_the_average_from_the_same_noise_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grids: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(callbacks, "save_grid", lambda images, path, columns: grids.update({path.name: images}))
    settings = values(tmp_path, "flow_matching", samples=36, preview_every=12, preview_count=7) | {
        "data": "digits", "model": {"name": "unet", "channels": [8], "attention": []}, "sampler": {"name": "euler", "steps": 2},
        "optimizer": {"name": "adamw", "lr": 1e-30},
    }  # fmt: skip
    train(run_of(settings), ALONE, lambda: False, [Previews])
    assert list(grids) == [f"{samples:012d}.png" for samples in (12, 24, 36)]
    first, *rest = grids.values()
    assert len(first) == 7 and first.std(0).max() > 0
    assert all(torch.equal(grid, first) for grid in rest)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (errno.ENOSPC, "the disk is full: free some space"),
        (errno.ENOENT, "was the run's directory moved or removed? Stop the run before that"),
    ],
)
def test_metrics_that_cannot_be_written_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, told: str) -> None:
    run = run_of(values(tmp_path, "flow_matching", samples=12))
    run.directory.mkdir(parents=True, exist_ok=True)
    metrics = MetricsFile(SimpleNamespace(run=run, clock=Clock(0, 12, 12), seconds=0.0, world=ALONE))  # type: ignore[arg-type]

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match=re.escape(f"metrics.jsonl cannot be written ({os.strerror(code)}); {told}")):
        metrics.on_log(SimpleNamespace(world=ALONE), {"samples": 12, "seconds": 1.0})  # type: ignore[arg-type]
