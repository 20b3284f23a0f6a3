from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gentrain.config import ConfigError, Document
from gentrain.domains.box import Box
from gentrain.methods.base import Clock
from gentrain.methods.consistency import flow_step, solver_step
from gentrain.methods.consistency_distillation import ConsistencyDistillation
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.paths.base import Path
from gentrain.paths.dual import Dual
from gentrain.paths.inside import Inside
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.trigflow import TrigFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.consistency import Consistency
from gentrain.training.run import parse_run
from tests.methods.toy import TinyNetwork, batch_of, noise_of
from tests.samplers.toy import GaussianNetwork

MEAN, STD = 0.3, 0.5


@pytest.mark.parametrize("path", [RectifiedFlow(), TrigFlow(), VariancePreserving()])
def test_a_flow_step_holds_x0_and_eps(path: Path) -> None:
    x0, eps = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    t = torch.full((5,), 0.7 * path.t_max, dtype=torch.float64)
    s = torch.full((5,), 0.4 * path.t_max, dtype=torch.float64)
    torch.testing.assert_close(flow_step(path, path.perturb(x0, eps, t), x0, t, s), path.perturb(x0, eps, s))


def test_a_flow_step_is_mirrored_at_walls() -> None:
    path = RectifiedFlow(space=Inside(domain=Box()))
    x, x0 = torch.tensor([[0.5]]), torch.tensor([[2.0]])
    moved = flow_step(path, x, x0, torch.tensor([1.0]), torch.tensor([0.5]))  # to 1.25
    assert moved.item() == pytest.approx(0.75)


def gaussian_teacher(path: Path) -> Denoiser:
    """Exact for data N(MEAN, STD^2) in each coordinate."""

    def network(x: torch.Tensor, t: torch.Tensor, condition: Condition | None) -> torch.Tensor:
        t = t / path.network_time(torch.ones(()))
        alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return (x - x0) / sigma.clamp(min=1e-6)  # velocity of the rectified flow

    return Denoiser(network, path, "velocity")


class ExactStudent(torch.nn.Module):
    """The consistency function of the Gaussian, MEAN + (x - alpha MEAN) STD / deviation, times a factor, as a velocity."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.factor = path, torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: Condition | None = None) -> torch.Tensor:
        t = (t / 1000)[:, None]
        deviation = ((1 - t) ** 2 * STD**2 + t**2).sqrt()
        x0 = MEAN + (x - (1 - t) * MEAN) * STD / deviation
        return self.factor * (x - x0) / t.clamp(min=1e-6)


def nets(student: torch.nn.Module, path: Path, teacher: Denoiser | None = None) -> SimpleNamespace:
    return SimpleNamespace(teacher=teacher or gaussian_teacher(path), student=Denoiser(student, path, "velocity"))


def test_the_exact_consistency_function_has_next_to_no_loss_and_others_have() -> None:
    path = RectifiedFlow()
    batch = {"x": MEAN + STD * noise_of(5000, 5000).normal((5000, 2))}
    student = ExactStudent(path)
    method = ConsistencyDistillation(intervals=100)
    losses = []
    for factor in (1.0, 0.9, 1.1):
        with torch.no_grad():
            student.factor.fill_(factor)
        losses.append(method.loss(nets(student, path), batch, noise_of(5000)).value.item())
    exact, low, high = losses
    assert exact < 3e-5 and low > 3e-4 and high > 3e-4  # 1.1e-5, what the teacher's finite step leaves, 4.9e-4 and 4.5e-4


def test_the_target_carries_no_gradient() -> None:
    """With the target detached, the gradient is that of the distance to a constant; finite differences of both sides would differ."""
    path, student = RectifiedFlow(), TinyNetwork()
    group, batch = nets(student, path), batch_of(64)
    ConsistencyDistillation().loss(group, batch, noise_of(64)).value.backward()
    found = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    frozen = TinyNetwork()
    seen = []

    class Split:
        """The student's first call, of the target, by a copy."""

        path, prediction = group.student.path, "velocity"

        def x0(self, x: torch.Tensor, t: torch.Tensor, condition: Condition | None) -> torch.Tensor:
            seen.append(t)
            return (Denoiser(frozen, path, "velocity") if len(seen) == 1 else group.student).x0(x, t, condition)

    ConsistencyDistillation().loss(SimpleNamespace(teacher=group.teacher, student=Split()), batch, noise_of(64)).value.backward()
    assert (seen[0] < seen[1]).all()
    assert all(parameter.grad is None for parameter in frozen.parameters())
    for a, parameter in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(a, parameter.grad)


def test_gradients_reach_the_student_only() -> None:
    teacher, student = TinyNetwork(), TinyNetwork()
    (update,) = ConsistencyDistillation(guidance=3.0).updates(Clock(0, 8, 80))
    assert update.role == ConsistencyDistillation.generator == "student"
    path = RectifiedFlow()
    update.losses[0](nets(student, path, Denoiser(teacher, path, "velocity")), batch_of(8), noise_of(8)).value.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    (seen,) = teacher.seen  # guided: conditional and null, in one call
    assert torch.equal(seen[:8], batch_of(8)["label"]) and (seen[8:] == -1).all()


def test_guidance_is_that_of_the_teacher() -> None:
    """A velocity of 1 given a label and 2 without is guided by 3 to 2 + 3 (1 - 2) = -1."""
    student, path = TinyNetwork(), RectifiedFlow()

    def loss(guidance: float, velocity: Callable[[torch.Tensor], torch.Tensor]) -> float:
        teacher = Denoiser(lambda x, t, c: velocity(c["label"])[:, None].expand_as(x).to(x), path, "velocity")
        (update,) = ConsistencyDistillation(guidance=guidance).updates(Clock(0, 8, 80))
        return update.losses[0](nets(student, path, teacher), batch_of(8), noise_of(8)).value.item()

    guided = loss(3.0, lambda label: torch.where(label < 0, 2.0, 1.0))
    assert guided == pytest.approx(loss(1.0, lambda label: torch.full_like(label, -1.0, dtype=torch.float32)))
    assert guided != pytest.approx(loss(1.0, lambda label: torch.ones_like(label, dtype=torch.float32)))


def test_predictions_without_the_boundary_condition_are_refused() -> None:
    settings = {
        "method": "consistency_distillation", "data": "rings", "model": "mlp", "prediction": "x0", "training": {"samples": 10},
        "roles": {"teacher": {"weights": "runs/teacher"}},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"prediction: .* needs a network that predicts v or velocity or edm, not x0"):
        parse_run(Document(settings, "x.yaml"))


SETTINGS = {
    "method": "consistency_distillation", "data": "rings", "model": "mlp", "training": {"samples": 10},
    "roles": {"teacher": {"weights": "runs/teacher"}},
}  # fmt: skip


@pytest.mark.parametrize("sampler, message", [
    ("heun", "sampler: heun does not ask a consistency function as it is taught, .*; take consistency or lcm"),
    ("flow_map", "sampler: flow_map does not ask"),
    ("one_step", "sampler: one_step does not ask"),
    ({"name": "consistency", "guidance": 2}, "guidance 2 asks for the null class, which consistency_distillation does not teach"),
])  # fmt: skip
def test_samplers_that_would_not_draw_what_is_taught_are_refused(sampler: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run(Document(SETTINGS | {"sampler": sampler}, "x.yaml"))


def test_students_that_know_the_null_class_may_be_guided() -> None:
    method = {"method": "easy_consistency_tuning", "roles": {}, "sampler": {"name": "consistency", "guidance": 2}}
    assert parse_run(Document(SETTINGS | method, "x.yaml")).sampler.guidance == 2


def ends_of(path: Path, x: torch.Tensor, t: float, s: float) -> torch.Tensor:
    """The flow of N(MEAN, STD^2) keeps quantiles."""
    times = torch.tensor([t, s], dtype=torch.float64)
    alpha, sigma = path.alpha(times), path.sigma(times)
    deviation = (alpha**2 * STD**2 + sigma**2).sqrt()
    return alpha[1] * MEAN + (x - alpha[0] * MEAN) * deviation[1] / deviation[0]


class Exact(GaussianNetwork):
    mean, deviation = MEAN, STD


@pytest.mark.parametrize("path", [RectifiedFlow(), TrigFlow(), VariancePreserving(), VarianceExploding()])
def test_heuns_step_is_of_second_order_and_ddims_of_first(path: Path) -> None:
    """Errors of one step fall with the cube and with the square of its length."""
    teacher, x = Exact(path).denoiser(), torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    for solver, order in (("ddim", 2), ("heun", 3)):
        errors = []
        for step in (0.04, 0.02):
            t, s = 0.5 * path.t_max, (0.5 - step) * path.t_max
            times = (torch.full((5,), each, dtype=torch.float64) for each in (t, s))
            found = solver_step(solver, teacher, x, *times, None, 1.0)  # type: ignore[arg-type]
            errors.append((found - ends_of(path, x, t, s)).abs().max().item())
        assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25), solver


def test_heuns_step_by_hand_from_pure_noise_to_data_and_mirrored_at_walls() -> None:
    """Velocities of 1 at the beginning and of 3 at the end of a step: 2 on average. To t = 0 it is Euler's."""
    x, labels = torch.zeros(2, 1), {"label": torch.tensor([0, 1])}
    calls = []

    def network(x: torch.Tensor, t: torch.Tensor, condition: Condition | None) -> torch.Tensor:
        assert condition is not None
        calls.append(condition["label"].tolist())
        return torch.where(t > 950, 1.0, 3.0)[:, None] - (condition["label"] < 0).float()[:, None]

    t, s = torch.ones(2), torch.tensor([0.5, 0.0])
    teacher = Denoiser(network, RectifiedFlow(), "velocity")
    assert solver_step("heun", teacher, x, t, s, labels, 1.0)[:, 0].tolist() == pytest.approx([-1.0, -1.0])  # 0.5 * 2 and 1 * 1
    assert calls == [[0, 1], [0, 1]]
    assert solver_step("heun", teacher, x, t, s, labels, 2.0)[:, 0].tolist() == pytest.approx(
        [-1.5, -2.0]
    )  # null is 1 less: guided is 1 more
    inside = Denoiser(network, RectifiedFlow(space=Inside(domain=Box(low=-0.75, high=0.75))), "velocity")
    assert solver_step("heun", inside, x, t, s, labels, 1.0)[0].item() == pytest.approx(-0.5)


def test_the_solver_makes_the_targets() -> None:
    """An exact function's loss is what the teacher's steps leave: of second order it is far less."""
    path = RectifiedFlow()
    batch = {"x": MEAN + STD * noise_of(2000, 2000).normal((2000, 2))}
    losses = [ConsistencyDistillation(intervals=20, solver=solver).loss(nets(ExactStudent(path), path), batch, noise_of(2000)).value.item()
              for solver in ("ddim", "heun")]  # type: ignore[arg-type]  # fmt: skip
    assert losses[1] < losses[0] / 3, losses


@pytest.mark.parametrize("steps", [1, 3])
def test_the_sampler_is_exact_with_the_exact_function(steps: int) -> None:
    path, count = RectifiedFlow(), 20_000
    x = Consistency(steps=steps).sample(Denoiser(ExactStudent(path), path, "velocity"), (count, 1), noise_of(count))
    assert abs(x.mean() - MEAN) < 0.015 and abs(x.std() - STD) < 0.01


@pytest.mark.parametrize("path", [RectifiedFlow(), TrigFlow(), VariancePreserving(), VarianceExploding()])
@pytest.mark.parametrize("steps", [2, 4])
def test_every_call_of_the_sampler_changes_something(path: Path, steps: int) -> None:
    """Ever closer to the data, and never from where they are reached already: Karras' last level is the variance-exploding path's least."""
    seen = []

    def network(x: torch.Tensor, t: torch.Tensor, condition: Condition | None) -> torch.Tensor:
        seen.append(float(t[0]))
        return torch.zeros_like(x)

    Consistency(steps=steps).sample(Denoiser(network, path, "x0"), (2, 1), noise_of(2))
    ends = path.network_time(torch.tensor([path.t_min, path.t_max], dtype=torch.float64)).tolist()
    assert len(seen) == steps and seen[0] == pytest.approx(ends[1])
    for before, after in zip(seen, [*seen[1:], ends[0]], strict=True):
        assert after < before - (ends[1] - ends[0]) / (3 * steps)


def test_every_interval_of_a_variance_exploding_path_has_two_ends() -> None:
    path, student = VarianceExploding(), TinyNetwork()
    group = SimpleNamespace(teacher=Denoiser(lambda x, t, c: torch.zeros_like(x), path, "edm"), student=Denoiser(student, path, "edm"))
    times: list[torch.Tensor] = []
    student.register_forward_pre_hook(lambda module, args: times.append(args[1]))
    ConsistencyDistillation(intervals=3).loss(group, batch_of(64), noise_of(64))
    s, t = times  # the target's, then the student's
    assert (s < t).all() and len(t.unique()) == 3


@pytest.mark.parametrize("space", [Inside(domain=Box()), Dual(domain=Box(), mean=[0.0], std=[0.01])])
def test_samples_stay_inside_in_bounded_spaces(space: Inside | Dual) -> None:
    far = Denoiser(lambda x, t, c: 100 * (x - 0.5), RectifiedFlow(space=space), "velocity")
    assert Box().contains(Consistency(steps=2).sample(far, (1000, 2), noise_of(1000))).all()
