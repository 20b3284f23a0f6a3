"""When a step counts as a spike: on losses that are negative, drift, wander or have heavy tails as well."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from gentrain.training.spikes import SpikeGuard, SpikeWatch

Loss = Callable[[random.Random, int], float]

LAWS: dict[str, Loss] = {  # of sound training, at step 0, 1, ...
    "falling": lambda rng, step: 1 / (1 + 0.01 * step) * rng.lognormvariate(0, 0.1),
    "rising": lambda rng, step: 0.5 + 0.0005 * step + rng.gauss(0, 0.05),
    "negative": lambda rng, step: -1 - 0.001 * step + rng.gauss(0, 0.1),
    "adversary": lambda rng, step: 0.7 + 0.2 * (step % 97) / 97 + rng.gauss(0, 0.05),
    "heavy tails": lambda rng, step: 1 + abs(rng.gauss(0, 1) / max(abs(rng.gauss(0, 1)), 0.05)) / 10,  # Cauchy
}


def _watch(**guard: object) -> SpikeWatch:
    return SpikeWatch(SpikeGuard(**guard), ("loss", "grad_norm"), {})  # type: ignore[arg-type]


@pytest.mark.parametrize("law", LAWS)
def test_sound_training_is_left_alone_and_a_jump_is_found(law: str) -> None:
    """With the guard's defaults, over 20 seeds of 2000 steps: no false alarm, and a jump of 50 as soon as it has lasted."""
    for seed in range(20):
        rng, watch = random.Random(seed), _watch()
        for step in range(2000):
            assert watch.see({"loss/model": LAWS[law](rng, step)}) == [], (seed, step)
        watch.see({"loss/model": -10.0})  # ends a streak
        found = [bool(watch.see({"loss/model": LAWS[law](rng, 2000) + 50})) for _ in range(5)]
        assert found == [False] * 4 + [True]


def test_a_spike_is_a_value_far_above_the_median_and_never_one_below() -> None:
    watch = _watch(window=5, patience=1, threshold=4)
    for value in (-1.0, -1.2, -0.8, -1.1, -0.9):  # median -1, MAD 0.1, robust deviation 0.14826
        assert watch.see({"loss/model": value}) == []
    assert watch.see({"loss/model": -1 - 100}) == []
    watch = _watch(window=5, patience=1, threshold=4)
    for value in (-1.0, -1.2, -0.8, -1.1, -0.9):
        watch.see({"loss/model": value})
    assert watch.see({"loss/model": -1 + 4 * 0.14826 + 1e-6}) == ["loss/model"]
    assert watch.streak == 1
    assert watch.see({"loss/model": -1 + 4 * 0.14826 - 1e-6}) == [] and watch.streak == 0


def test_spikes_do_not_become_the_norm() -> None:
    watch = _watch(window=5, patience=100)
    for value in (1.0, 1.1, 0.9, 1.0, 1.05, *[50.0] * 20):
        watch.see({"loss/model": value})
    assert watch.streak == 20


def test_each_metric_is_judged_by_itself_and_the_streak_is_of_any() -> None:
    watch = _watch(window=3, patience=2)
    for value in (1.0, 1.1, 0.9):
        watch.see({"loss/a": value, "loss/b": 100 * value})
    assert watch.see({"loss/a": 100.0, "loss/b": 100.0}) == []
    assert watch.see({"loss/a": 1.0, "loss/b": 10_000.0}) == ["loss/b"]


def test_metrics_that_never_moved_do_not_make_every_value_a_spike() -> None:
    watch = _watch(window=3, patience=1)
    for _ in range(3):
        watch.see({"loss/zero": 0.0, "loss/same": 1.0})
    assert watch.see({"loss/zero": 1.0, "loss/same": 1.001}) == []
    assert watch.see({"loss/same": 1.02}) == ["loss/same"]


def test_a_method_names_what_is_watched() -> None:
    watch = SpikeWatch(SpikeGuard(), ("grad_norm", "loss/student"), {})
    keys = ["loss/student", "loss/critic", "grad_norm/critic", "accuracy"]
    assert [key for key in keys if watch.watches(key)] == ["loss/student", "grad_norm/critic"]


def test_its_state_goes_on_where_it_was() -> None:
    rng = random.Random(0)
    values = [LAWS["falling"](rng, step) + 9 * (step >= 56) for step in range(60)]
    whole, first = _watch(window=30, patience=4), _watch(window=30, patience=4)
    for value in values[:58]:
        whole.see({"loss/model": value})
        first.see({"loss/model": value})
    second = SpikeWatch(SpikeGuard(window=30, patience=4), ("loss",), first.state())
    for value in values[58:]:
        assert whole.see({"loss/model": value}) == second.see({"loss/model": value})
    assert second.streak == 4 and second.state() == whole.state()
    assert second.roll_back() and (second.rollbacks, second.streak) == (1, 0)


def test_rollbacks_are_limited() -> None:
    watch = _watch(max_rollbacks=2)
    assert [watch.roll_back() for _ in range(3)] == [True, True, False]
    assert watch.rollbacks == 2


def test_one_wild_value_before_the_window_was_full_does_not_hide_a_spike() -> None:
    watch = _watch(window=5, patience=1)
    for value in (1.0, 1.1, 1000.0, 0.9, 1.05):
        assert watch.see({"loss/model": value}) == []
    assert watch.see({"loss/model": 50.0}) == ["loss/model"]


def test_what_is_not_finite_is_a_spike_and_no_part_of_the_past() -> None:
    watch = _watch(window=5, patience=2, threshold=4)
    watch.see({"loss/model": math.nan})  # before anything is judged
    for value in (1.0, 1.1, 0.9, 1.0, 1.05):
        assert watch.see({"loss/model": value}) == []
    assert (watch.see({"loss/model": math.nan}), watch.see({"loss/model": math.inf})) == ([], ["loss/model"])
    assert watch.state()["past"] == {"loss/model": [1.0, 1.1, 0.9, 1.0, 1.05]}
