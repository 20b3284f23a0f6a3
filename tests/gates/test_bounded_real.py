"""Household budgets on the simplex and a bacterium's fluxes in their polytope, by the shipped configurations.

Distances are squared sliced Wasserstein distances from held-out data, times 1e4. Of the budgets the train and held-out splits are 1.9
apart; fresh fluxes are 2.6 from the held-out ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from torch import Tensor

from gentrain.cluster.generation import generate
from gentrain.data.budget_shares import BudgetShares
from gentrain.data.core_flux import CoreFlux
from gentrain.metrics.distances import sliced_wasserstein
from gentrain.recipes.base import load_recipe, run_recipe
from gentrain.training.run import open_run

pytestmark = [pytest.mark.gate, pytest.mark.timeout(3600)]

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SEEDS = (0, 1, 2)
Record = Callable[[str, object], None]


def drawn(place: Path, config: str, seed: int, label: Tensor) -> Tensor:
    """Trains a configuration and draws a sample for each label with its own sampler."""
    recipe = place / "recipe.yaml"
    recipe.write_text(f"output: {place / 'runs'}\nstages: {{model: {{name: train, run: {{base: {CONFIGS / config}, seed: {seed}}}}}}}\n")
    run_recipe(load_recipe(recipe), lambda line: None)
    run = open_run(place / "runs" / "model")
    assert run.sampler is not None
    return generate(place / "runs" / "model", run.sampler, label, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method, limit", [("mirror_flow", 3.0), ("reflected_diffusion", 4.0)])
def test_household_budgets(tmp_path: Path, method: str, limit: float, seed: int, record_property: Record) -> None:
    """3,040 samples, ten of the class of each held-out household. The share of food falls with the expenditure (Engel's law)."""
    data = BudgetShares()
    held_out = data.split("held_out")
    label = held_out.label.repeat(10)
    x = drawn(tmp_path, f"budget_shares/{method}.yaml", seed, label)
    distance = 1e4 * sliced_wasserstein(x, held_out.x)
    parts = data.domain.parts(x.double())
    food = [parts[label == number, 0].mean().item() for number in (0, 4)]
    few = {name: (parts[:, part] < 1e-3).double().mean().item() for name, part in (("alcohol", 5), ("clothes", 3))}
    outside = int((~data.domain.contains(x)).sum())
    record_property("distance", round(distance, 2))
    record_property("outside", outside)
    record_property("% below 0.001: alcohol, clothes", [round(100 * value, 1) for value in few.values()])
    record_property("food, lowest and highest class", [round(value, 3) for value in food])
    assert outside == 0
    assert distance < limit
    assert food[0] - food[1] > 0.08  # of the data 0.13
    assert method != "mirror_flow" or (0.10 < few["alcohol"] < 0.20 and 0.03 < few["clothes"] < 0.10)


@cache
def fluxes() -> CoreFlux:
    return CoreFlux()


@pytest.mark.parametrize("seed", SEEDS)
def test_core_fluxes(tmp_path: Path, seed: int, record_property: Record) -> None:
    data = fluxes()
    held_out = data.split("held_out")
    x = drawn(tmp_path, "core_flux/mirror_flow.yaml", seed, held_out.label)
    outside = int((~data.domain.contains(x)).sum())
    stoichiometry, low, high, _ = data._model
    v = data.fluxes(x)
    imbalance = float((v @ stoichiometry.T).abs().max())
    asked = float((data._bins.label(data.growth_rate(x)) == held_out.label).double().mean())
    distance = 1e4 * sliced_wasserstein(x, held_out.x)
    record_property("distance", round(distance, 2))
    record_property("outside", outside)
    record_property("largest |S v|", f"{imbalance:.1e}")
    record_property("growth rate in the class asked for", round(asked, 3))
    assert outside == 0
    assert imbalance < 1e-9
    assert (v > low - 1e-9).all() and (v < high + 1e-9).all()
    assert asked > 0.8
    assert distance < 10
