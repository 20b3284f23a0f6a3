"""Few-step generators: students of every member of the family on mixtures, the fixed point of distillation, every engine.

Distances on the mixture of eight normal laws in the plane are squared sliced Wasserstein distances of 5,000 samples from as many fresh
points of the same classes; two fresh sets are 2.3e-5 to 4.4e-5 apart (test_mixture.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path as FilePath
from typing import Any, NamedTuple

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
from gentrain.models.mlp import MLP
from gentrain.noise import Noise, derive
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.times import LogitNormal, LogNormal
from gentrain.samplers.base import Sampler
from gentrain.samplers.consistency import Consistency
from gentrain.samplers.euler import Euler
from gentrain.samplers.flow_map import FlowMap, flow_map
from gentrain.samplers.lcm import LCM
from gentrain.training.roles import load_weights
from tests.distributed.cases import ENGINES, Job, difference, records, runs_apart, state_of, train_all
from tests.distributed.test_few_step import DERIVED, METHODS, TOLERANCE, settings, teacher
from tests.methods.few_step import Line, draw, train
from tests.methods.test_latent_consistency import learnt_slope
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gate, pytest.mark.timeout(3600)]

SEEDS = (0, 1, 2)
STEPS, BATCH, COUNT = 1000, 256, 5000
DRAWN = 50_000  # of the line: 5,000 of its own law are .008 to .022 (W1) from it, these .003 to .009
SLOW = MLP(time_scale=0.01)
Record = Callable[[str, object], None]
RF = RectifiedFlow()


def consistency(steps: int) -> Sampler:
    return Consistency(steps=steps)


class Case(NamedTuple):
    """A method, how long it learns the line, and the most that its students may be away from the plane's laws in one and in two calls.

    The squared distance and no norm, for in few coordinates another flow is the optimum of a norm; noisy targets want batches or steps.
    """

    make: Callable[[], Method]
    sampler: Callable[[int], Sampler]
    steps: int
    plane: tuple[float, float]
    batch: int = BATCH  # of the line
    average: float = 0.0  # decay a step of the average of the weights that is drawn from; 0 = the last weights
    begins: bool = True  # as the flow


CASES: dict[str, Case] = {
    "consistency_distillation": Case(lambda: ConsistencyDistillation(distance="l2"), consistency, 4000, (1e-3, 1.1e-3)),
    "latent_consistency": Case(lambda: LatentConsistency(guidance=(1.0, 1.0)), lambda steps: LCM(steps=steps), 2000, (1.5e-3, 4e-4)),
    "consistency_training": Case(
        lambda: ConsistencyTraining(distance="l2", mean=1.0, last_intervals=640), consistency, 6000, (5e-4, 3.5e-4), begins=False
    ),
    "easy_consistency_tuning": Case(
        lambda: EasyConsistencyTuning(distance="l2", times=LogNormal(mean=0.5, std=1.5)), consistency, 6000, (1.6e-3, 7e-4)
    ),
    "mean_flow": Case(
        lambda: MeanFlow(power=0.0, times=LogitNormal(std=2.5), equal=0.25, derivative="difference"),
        lambda steps: FlowMap(steps=steps),
        4000,
        (2.2e-3, 2e-3),
        batch=1024,
        average=0.998,
    ),
    "continuous_consistency": Case(ContinuousConsistency, consistency, 1000, (6e-4, 5e-4)),
}


@cache
def flow(seed: int, line: bool) -> Denoiser:
    where, steps = (Line(seed), 2 * STEPS) if line else (None, STEPS)
    return train(FlowMatching(), RF, "velocity", seed, steps, model=SLOW, line=where)


def student(name: str, seed: int, line: bool, record_property: Record) -> Denoiser:
    case = CASES[name]
    method = case.make()
    own = method.roles[str(method.generator)].init or str(method.generator)
    weights = {own: flow(seed, line).network.state_dict()} if case.begins else {}  # type: ignore[attr-defined]
    where, steps, batch = (Line(seed), case.steps, case.batch) if line else (None, STEPS, BATCH)
    begin = time.process_time()
    learnt = train(method, RF, "velocity", seed, steps, weights, lr=1e-3, batch=batch, model=SLOW, line=where, average=case.average)
    record_property("training, s of processor", round(time.process_time() - begin))
    return learnt


def distance(denoiser: Denoiser, sampler: Sampler, seed: int) -> float:
    labels = torch.arange(COUNT) % 8
    fresh: Tensor = Mixture().draw(labels, Noise(derive(seed, "fresh"), torch.arange(COUNT)))
    return sliced_wasserstein(draw(denoiser, sampler, labels, seed), fresh)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_students_of_a_mixture(name: str, seed: int, record_property: Record) -> None:
    """The table of docs/methods/few_step.md. Floors: twice the worst of three seeds."""
    learnt, case = student(name, seed, False, record_property), CASES[name]
    found = {steps: distance(learnt, case.sampler(steps), seed) for steps in (1, 2, 4)}
    for steps, value in found.items():
        record_property(f"{steps} steps", f"{value:.1e}")
    for steps, at_most in zip((1, 2), case.plane, strict=True):
        assert found[steps] < at_most, steps


@pytest.mark.parametrize("seed", SEEDS)
def test_the_flow_that_students_begin_with(seed: int, record_property: Record) -> None:
    found = {steps: distance(flow(seed, False), Euler(steps=steps), seed) for steps in (1, 50)}
    for steps, value in found.items():
        record_property(f"{steps} steps", f"{value:.1e}")
    assert found[50] < 1e-3


def w1(denoiser: Denoiser, sampler: Sampler, line: Line, seed: int) -> float:
    """Between samples and the data's own quantiles."""
    with torch.no_grad():
        drawn = sampler.sample(denoiser, (DRAWN, 1), Noise(derive(seed, "sample"), torch.arange(DRAWN)))
    exact = line.quantile((torch.arange(DRAWN, dtype=torch.float64) + 0.5) / DRAWN)
    return float((drawn[:, 0].double().sort().values - exact).abs().mean())


def mean_error(denoiser: Denoiser, line: Line, seed: int) -> float:
    """|f(x_t, t -> 0) - f*| over x_t of the path at nine times of equal spacing up to the end; f* keeps the order of points."""
    path, total = denoiser.path, 0.0
    noise = Noise(derive(seed, "points"), torch.arange(COUNT))
    x0, eps = line.batch(torch.arange(COUNT) + 2**39)["x"], noise.normal((COUNT, 1))
    for moment in path.sampling_times(9).tolist():
        t = torch.full((COUNT,), moment)
        x_t = path.perturb(x0, eps, t)
        with torch.no_grad():
            found = flow_map(denoiser, x_t, t, torch.full_like(t, path.t_min))[:, 0].double()
        share = line.share_below(x_t[:, 0].double(), float(path.alpha(t)[0]), float(path.sigma(t)[0]))
        total += float((found - line.quantile(share)).abs().mean()) / 9
    return total


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_students_of_a_flow_on_the_line_that_is_known(name: str, seed: int, record_property: Record) -> None:
    """Asked of every member: W1 <= .05 in one step, mean |f - f*| <= .06."""
    learnt, case, line = student(name, seed, True, record_property), CASES[name], Line(seed)
    one, error = w1(learnt, case.sampler(1), line, seed), mean_error(learnt, line, seed)
    record_property("W1 in one step", round(one, 4))
    record_property("W1 in two steps", round(w1(learnt, case.sampler(2), line, seed), 4))
    record_property("mean |f - f*|", round(error, 4))
    assert one <= 0.05 and error <= 0.06


@pytest.mark.parametrize("seed", SEEDS)
def test_a_student_learns_the_slope_of_ddim_50_and_not_of_the_flow(seed: int, record_property: Record) -> None:
    """Thresholds of the specification; the flow's own slope, 1.19862, is 2.5 % off."""
    slope, std = learnt_slope(seed)
    record_property("slope", round(slope, 5))
    record_property("one-step deviation", round(std, 4))
    assert slope == pytest.approx(1.16924, rel=1e-4)  # asked: 0.5 %; measured: 1.16924 with every seed
    assert std == pytest.approx(1.169, rel=1e-2)


FINE: dict[str, dict[str, Any]] = {"jvp": {}, "difference": {"derivative": "difference", "step": 2e-4}}
RUNS = [(method, {}) for method in METHODS] + [(method, {"derivative": "difference"}) for method in DERIVED]


def job(root: FilePath, run: tuple[str, dict[str, Any]], engine: str, ranks: int, name: str = "", stop_at: int | None = None) -> Job:
    method, fields = run
    return Job(settings(root, f"{name}{engine}-{ranks}-{fields.get('derivative', '')}", method, ENGINES[engine], **fields), stop_at=stop_at)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> FilePath:
    """The teacher, and every run on one rank with the reference engine."""
    root = tmp_path_factory.mktemp("runs")
    run_ranks(1, train_all, [teacher(root), *(job(root, run, "torch", 1) for run in RUNS)])
    return root


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_give_the_curve_of_one_with_every_derivative_claimed(root: FilePath, engine: str, record_property: Record) -> None:
    """jvp everywhere but at stage 3, which refuses it, the central difference everywhere. Stopped and resumed, the same to the last bit."""
    runs = [run for run in RUNS if engine != "zero3" or run not in [(method, {}) for method in DERIVED]]
    halves = [job(root, run, engine, 2, "halves-", stop_at) for run in runs for stop_at in (3, None)]
    for outcomes in run_ranks(2, train_all, [job(root, run, engine, 2) for run in runs] + halves):
        assert outcomes == [("finished", "")] * len(runs) + [("stopped", ""), ("finished", "")] * len(runs)
    for run in runs:
        reference, other = (FilePath(job(root, run, e, n).settings["output"]) for e, n in (("torch", 1), (engine, 2)))
        apart = runs_apart(reference, other)
        record_property(f"largest relative difference, {other.name}", apart)
        assert apart <= TOLERANCE, other.name
        resumed = other.with_name(f"halves-{other.name}")
        assert records(other) == records(resumed) and difference(state_of(other), state_of(resumed)) == 0, resumed.name


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
