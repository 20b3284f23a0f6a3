"""A user's plugin: its second rank comes late to the first attempt of a run, and every step takes its time."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gentrain.config import option, register
from gentrain.methods.base import Clock, Update
from gentrain.methods.flow_matching import FlowMatching

_marker = Path(os.environ.get("LATE_MARKER", "/nonexistent"))
if os.environ.get("RANK") == "1" and _marker.parent.is_dir() and not _marker.exists():
    _marker.touch()
    time.sleep(600)


@register("slow_flow")
@dataclass
class SlowFlow(FlowMatching):
    """Flow matching that sleeps before each step."""

    sleep_s: float = option(0.1, "before each step", unit="s")

    def updates(self, clock: Clock) -> Iterator[Update]:
        time.sleep(self.sleep_s)
        yield from super().updates(clock)
