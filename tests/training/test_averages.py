"""Averages whose length is chosen after training: the profiles, what an engine keeps, what the stage puts together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gentrain.config import ConfigError
from gentrain.recipes.average import Average
from gentrain.training.averages import coefficients, gamma_of, overlap, power_decay
from gentrain.training.callbacks import MetricsFile
from gentrain.training.loop import train
from gentrain.training.roles import load_network, load_weights
from gentrain.training.run import save_config
from gentrain.training.storage import LocalStorage
from gentrain.training.world import World
from tests.distributed.cases import Job, difference, newest, run_of, state_of, train_all, values
from tests.ranks import run_ranks

ALONE = World(0, 1, torch.device("cpu"))
LENGTHS = [0.05, 0.1]


@pytest.mark.parametrize("length, gamma", [(0.05, 16.97), (0.10, 6.94), (0.25, 0.72)])
def test_gammas_are_those_of_the_paper(length: float, gamma: float) -> None:
    """EDM2's two, and one by the formula of the deviation."""
    found = gamma_of(length)
    assert found == pytest.approx(gamma, abs=0.2) and (found + 1) ** 0.5 / (found + 2) / (found + 3) ** 0.5 == pytest.approx(length)


@pytest.mark.parametrize("a, b", [((1.0, 5.0), (1.0, 5.0)), ((0.4, 16.97), (1.0, 6.94)), ((1.0, 0.7), (0.6, 6.94))])
def test_overlaps_are_integrals_of_products(a: tuple[float, float], b: tuple[float, float]) -> None:
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    product = torch.ones_like(t)
    for time, gamma in (a, b):
        product = product * torch.where(t <= time, (gamma + 1) * t**gamma / time ** (gamma + 1), 0.0)
    assert overlap(*a, *b) == pytest.approx(float(torch.trapezoid(product, t)), rel=1e-3)


def profile(length: float, steps: int) -> torch.Tensor:
    """What each of the weights after `steps` steps counts in the average."""
    weight = torch.zeros(steps, dtype=torch.float64)
    for step in range(1, steps + 1):
        decay = power_decay(length, step)
        weight *= decay
        weight[step - 1] += 1 - decay
    return weight


@pytest.mark.parametrize("length", [0.05, 0.1, 0.2])
def test_the_decay_gives_the_profile_and_its_deviation_is_the_length(length: float) -> None:
    steps = 2000
    weight, gamma = profile(length, steps), gamma_of(length)
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    assert weight.sum() == pytest.approx(1)
    torch.testing.assert_close(weight * steps, (gamma + 1) * t**gamma, atol=0.02 * (gamma + 1), rtol=0.02)
    mean = (weight * t).sum()
    assert (weight * (t - mean).square()).sum().sqrt() == pytest.approx(length, rel=0.01)


def test_a_stored_average_is_found_again() -> None:
    factors, missing = coefficients([0.5, 0.5, 1.0, 1.0], [*LENGTHS, *LENGTHS], 1.0, 0.1)
    torch.testing.assert_close(factors, torch.tensor([0.0, 0, 0, 1], dtype=torch.float64), atol=1e-6, rtol=0)
    assert missing < 1e-5


@pytest.mark.parametrize("length, near", [(0.03, 0.05), (0.07, 0.005), (0.15, 0.012), (0.25, 0.1)])
def test_averages_between_and_beyond_come_near_what_would_have_been_kept(length: float, near: float) -> None:
    """16 snapshots of two averages. Measured: 0.0386, 0.0038, 0.0090, 0.0767 of the profile's norm, in steps as by the formula."""
    steps, times = 1600, [100 * (k + 1) for k in range(16)]
    stored = [(time, each) for time in times for each in LENGTHS]
    factors, missing = coefficients([time for time, _ in stored], [each for _, each in stored], steps, length)
    together = torch.zeros(steps, dtype=torch.float64)
    for (time, each), factor in zip(stored, factors.tolist(), strict=True):
        together[:time] += factor * profile(each, time)
    direct = profile(length, steps)
    assert (together - direct).norm() / direct.norm() < near and missing < near
    assert len(coefficients([steps] * 2, LENGTHS, steps, length)[0]) == 2
    assert coefficients([steps] * 2, LENGTHS, steps, length)[1] > missing  # with fewer snapshots it is farther


def settings(output: Path, engine: Any = "torch", **training: Any) -> dict[str, Any]:
    return values(output, "flow_matching", engine, power_ema=LENGTHS, keep_every=12, **training) | {"model": "mlp"}


def trained(given: dict[str, Any], stop_after: int | None = None) -> None:
    steps = iter(range(1000))
    run = run_of(given)
    save_config(run)
    train(run, ALONE, lambda: stop_after is not None and next(steps) >= stop_after, [MetricsFile])


def test_an_engine_keeps_them_and_a_run_goes_on_with_them_bit_for_bit(tmp_path: Path) -> None:
    trained(settings(tmp_path / "whole", checkpoint_every=12))
    trained(settings(tmp_path / "parts"), stop_after=3)
    trained(settings(tmp_path / "parts"))
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(value, parts[key]) for key, value in whole.items())
    storage = LocalStorage(newest(tmp_path / "whole").parent)
    weights = [state_of(tmp_path / "whole", name)["model.weights/output.weight"].double() for name in storage.names()]
    assert len(weights) == 6
    for number, length in enumerate(LENGTHS):
        expected = sum(share * each for share, each in zip(profile(length, 6).tolist(), weights, strict=True))
        torch.testing.assert_close(whole[f"model.power{number}/output.weight"].double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_shards_on_two_ranks_keep_the_same_averages(tmp_path: Path) -> None:
    trained(settings(tmp_path / "one"))
    jobs = [Job(settings(tmp_path / f"zero{stage}", {"name": "deepspeed", "zero_stage": stage})) for stage in (2, 3)]
    run_ranks(2, train_all, jobs)
    for stage in (2, 3):
        state, one = state_of(tmp_path / f"zero{stage}"), state_of(tmp_path / "one")
        powers, weights = ([{k: v for k, v in each.items() if kind in k} for each in (state, one)] for kind in (".power", ".weights"))
        assert len(powers[0]) == 2 * len(weights[0]) and difference(*powers) <= 2 * difference(*weights) < 1e-3  # 1.2e-4 apart, measured


def test_the_stage_makes_a_run_of_another_length(tmp_path: Path) -> None:
    trained(settings(tmp_path / "run", checkpoint_every=12, samples=240))
    storage = LocalStorage(newest(tmp_path / "run").parent)
    names = storage.names()
    weights = [state_of(tmp_path / "run", name)["model.weights/output.weight"].double() for name in names]
    for length, near in ((0.15, 0.03), (0.1, 0.002)):
        made = tmp_path / f"made-{length}"
        Average(str(tmp_path / "run"), length).execute(made)
        expected = sum(share * each for share, each in zip(profile(length, 20).tolist(), weights, strict=True))
        found = load_weights(str(made))["output.weight"].double()
        assert (found - expected).norm() < near * (expected - weights[-1]).norm()
        assert json.loads((made / "average.json").read_text())["missing"] < 0.05
    _, run = load_network(tmp_path / "made-0.1")
    assert run.output == str(tmp_path / "made-0.1")
    before, after = (state_of(tmp_path / name) for name in ("run", "made-0.1"))
    assert all(torch.equal(after[key], value) for key, value in before.items() if "weights" in key)


def test_what_cannot_be_put_together_is_refused(tmp_path: Path) -> None:
    trained(values(tmp_path / "plain", "flow_matching") | {"model": "mlp"})
    with pytest.raises(ConfigError, match=r"was not trained with training\.power_ema"):
        Average(str(tmp_path / "plain"), 0.1).execute(tmp_path / "made")
    with pytest.raises(ConfigError, match=r"training\.power_ema\[0\]: expected a list"):
        run_of(values(tmp_path / "long", "flow_matching", power_ema=[0.3]))
    trained(settings(tmp_path / "judge") | {"method": "classifier", "model": "cnn", "data": "digits"})
    with pytest.raises(ConfigError, match="keeps no average of a generator"):
        Average(str(tmp_path / "judge"), 0.1).execute(tmp_path / "made")
