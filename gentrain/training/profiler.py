"""What a few steps of a run spend their time and memory on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gentrain.training.callbacks import Callback
from gentrain.training.profile import Profile

if TYPE_CHECKING:
    from gentrain.training.loop import Trainer

log = logging.getLogger(__name__)

PROFILE = "profile"


class Profiler(Callback):
    """Writes profile/rank-<n>.json.gz (for perfetto.dev or chrome://tracing), a table beside it and, if asked, a memory snapshot."""

    def __init__(self, trainer: Trainer):
        self._profile: Profile | None = trainer.run.training.profile
        self._stem = trainer.run.directory / PROFILE / f"rank-{trainer.world.rank}"
        self._done = 0
        self._running: Any = None
        if self._profile is not None and self._profile.skip == 0:
            self._start(trainer.world.device)

    def _start(self, device: torch.device) -> None:
        from torch.profiler import ProfilerActivity, profile

        assert self._profile is not None
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        if self._profile.memory and device.type == "cuda":
            torch.cuda.memory._record_memory_history()
        self._running = profile(activities=activities, record_shapes=True, profile_memory=self._profile.memory)
        self._running.start()

    def after_step(self, trainer: Trainer) -> None:
        if self._profile is None:
            return
        self._done += 1
        if self._done == self._profile.skip:
            self._start(trainer.world.device)
        elif self._running is not None and self._done == self._profile.skip + self._profile.steps:
            self._stop(trainer.world.device)

    def _stop(self, device: torch.device) -> None:
        assert self._running is not None and self._profile is not None
        running, self._running = self._running, None
        running.stop()
        self._stem.parent.mkdir(exist_ok=True)
        running.export_chrome_trace(f"{self._stem}.json.gz")
        by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        Path(f"{self._stem}.txt").write_text(running.key_averages().table(sort_by=by, row_limit=40))
        if self._profile.memory and device.type == "cuda":
            torch.cuda.memory._dump_snapshot(f"{self._stem}-memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        log.info("profile of %d steps: %s.json.gz", self._profile.steps, self._stem)

    def on_end(self, trainer: Trainer) -> None:
        if self._running is not None:  # the run ended amid the steps to look at
            self._stop(trainer.world.device)
