"""Runs inside convex sets as users start them: one-step students by their recipe; every engine and ZeRO stage on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gentrain.cluster.generation import generate
from gentrain.data.toys import Checkerboard
from gentrain.domains.box import Box
from gentrain.metrics.distances import sliced_wasserstein
from gentrain.noise import Noise, derive
from gentrain.recipes.base import load_recipe, run_recipe
from gentrain.samplers.base import Sampler
from gentrain.samplers.consistency import Consistency
from gentrain.samplers.euler import Euler
from gentrain.samplers.reflected_ode import ReflectedODE
from tests.distributed.cases import Job, difference, record_difference, records, state_of, train_all, values
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gate, pytest.mark.timeout(3600)]

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
COUNT = 10_000
Record = Callable[[str, object], None]


TEACHERS: dict[str, tuple[str, Sampler]] = {"mirror_flow": ("dual", Euler(steps=50)), "reflected_flow": ("inside", ReflectedODE(steps=50))}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_one_step_student(tmp_path: Path, teacher: str, seed: int, record_property: Record) -> None:
    """The two trainings of configs/checkerboard/consistency.yaml, half as long, in the mirror image of the box and in the box itself.

    Distances are squared sliced Wasserstein distances from fresh points of the same classes; a hit is a sample in the dark square of its
    class.
    """
    space, many_steps = TEACHERS[teacher]
    stages = yaml.safe_load((CONFIGS / "checkerboard" / "consistency.yaml").read_text())["stages"]
    trainings = {name: stages[name] for name in ("teacher", "student")}
    for stage in trainings.values():
        stage["run"] |= {"seed": seed}
        stage["run"]["training"]["samples"] = 256_000
        stage["run"]["path"]["space"]["name"] = space
    trainings["teacher"]["run"] |= {"method": teacher, "sampler": many_steps.registered_name}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"output": str(tmp_path / "runs"), "stages": trainings}, sort_keys=False))
    run_recipe(load_recipe(tmp_path / "recipe.yaml"), lambda line: None)
    board, label = Checkerboard(), torch.arange(COUNT) % 8
    fresh = board.draw(label, Noise(derive(seed, "fresh"), torch.arange(COUNT)))
    square = fresh.add(1).mul(2).floor()
    samplers = {"teacher, 50 steps": many_steps, "teacher, 1 step": type(many_steps)(steps=1), "student, 1 step": Consistency()}
    found = {}
    for name, sampler in samplers.items():
        x = generate(tmp_path / "runs" / name.split(",")[0], sampler, label)
        assert Box(-1.0, 1.0).contains(x).all()
        hits = (x.add(1).mul(2).floor() == square).all(1).double().mean().item()
        found[name] = sliced_wasserstein(x, fresh)
        record_property(name, f"{found[name]:.1e}, hits {hits:.4f}")
    assert found["student, 1 step"] < found["teacher, 1 step"] / 4
    assert hits > 0.6


@pytest.mark.distributed
def test_every_zero_stage_on_two_ranks_gives_the_curve_of_one(tmp_path: Path, record_property: Record) -> None:
    from tests.distributed.test_constrained import RUNS

    engines: dict[str, Any] = {"torch": "torch"} | {f"zero{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in range(4)}

    def job(run: str, engine: str, ranks: int) -> Job:
        settings = values(tmp_path / f"{run}-{engine}-{ranks}", RUNS[run]["method"], engines[engine])
        return Job(settings | RUNS[run] | {"model": {"name": "dropout_mlp", "dropout": 0}})

    run_ranks(1, train_all, [job(run, "torch", 1) for run in RUNS])
    run_ranks(2, train_all, [job(run, engine, 2) for run in RUNS for engine in engines])
    worst = 0.0
    for run in RUNS:
        reference = tmp_path / f"{run}-torch-1"
        for engine in engines:
            other = tmp_path / f"{run}-{engine}-2"
            worst = max(worst, record_difference(records(reference), records(other)), difference(state_of(reference), state_of(other)))
    record_property("largest relative difference", worst)
    assert worst <= 1e-5
