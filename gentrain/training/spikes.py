"""Spikes of the loss: told from ordinary noise by robust statistics, so that a run can go back to its last checkpoint and past the data."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from gentrain.config import option

_NORMAL = 1.4826  # standard deviations of a normal law in its median absolute deviation
_FLOOR = 1e-3  # of the median: the least deviation, where values hardly move


@dataclass
class SpikeGuard:
    """Goes back to the last checkpoint, and on behind the data that followed, when the loss has jumped (arXiv:2204.02311, section 5.1)."""

    threshold: PositiveFloat = option(10.0, "a value this far above the median is a spike", unit="standard deviations, robust")
    window: PositiveInt = option(100, "of the median and the deviation, without spikes; nothing is judged before it is full", unit="steps")
    patience: PositiveInt = option(5, "spikes in a row after which the run goes back", unit="steps")
    max_rollbacks: NonNegativeInt = option(3, "times that a run may go back; then it ends as diverged")


class SpikeWatch:
    """Judges the steps of one run. Every rank is given the same values, so that all come to the same verdict.

    Args:
        guarded: metrics, or groups of them ("loss" is every loss/<role>), that jump only when training goes wrong.

    Attributes:
        streak: spikes in a row up to now: while it is not zero the weights are under suspicion.
    """

    def __init__(self, guard: SpikeGuard, guarded: Sequence[str], state: Mapping[str, Any]):
        self._guard, self._guarded = guard, guarded
        self._past: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=guard.window))
        for key, values in state.get("past", {}).items():
            self._past[key].extend(values)
        self.streak: int = state.get("streak", 0)
        self.rollbacks: int = state.get("rollbacks", 0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"past": {key: list(past) for key, past in self._past.items()}, "streak": self.streak, "rollbacks": self.rollbacks}

    def watches(self, key: str) -> bool:
        return key in self._guarded or key.partition("/")[0] in self._guarded

    def see(self, values: Mapping[str, float]) -> list[str]:
        """Takes the values of one step; the keys that spike, once `patience` steps in a row had any, else none."""
        spikes = [key for key, value in values.items() if self._jumps(key, value)]
        self.streak = self.streak + 1 if spikes else 0
        for key in values.keys() - set(spikes):
            if math.isfinite(values[key]):
                self._past[key].append(values[key])
        return spikes if self.streak >= self._guard.patience else []

    def roll_back(self) -> bool:
        """Counts a rollback, after which nothing is under suspicion; False when there were `max_rollbacks` before."""
        if self.rollbacks == self._guard.max_rollbacks:
            return False
        self.rollbacks, self.streak = self.rollbacks + 1, 0
        return True

    def _jumps(self, key: str, value: float) -> bool:
        past = self._past[key]
        if len(past) < self._guard.window:
            return False
        median = statistics.median(past)
        deviation = max(_NORMAL * statistics.median(abs(each - median) for each in past), _FLOOR * abs(median))
        return deviation > 0 and not value <= median + self._guard.threshold * deviation  # what is not a number is a spike, too
