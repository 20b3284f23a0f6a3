"""The terms of joint distribution matching against linear-Gaussian laws, where everything is known in closed form.

Data x ~ N(0, 1), condition c | x ~ N(x, TAU2), student x = a c + b z with z ~ N(0, 1) and c of the data's law N(0, 1 + TAU2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path as FilePath
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gentrain.config import ConfigError, register
from gentrain.data.toys import Mixture
from gentrain.data.unlabelled import Unlabelled
from gentrain.extractors.base import Extractor
from gentrain.extractors.closed_form import DownSampling, Signs
from gentrain.extractors.label import Label
from gentrain.methods.base import Clock
from gentrain.methods.jdm import JDM, condition_loss, decoupled_guidance
from gentrain.methods.led_by_scores import pseudo_target_loss
from gentrain.methods.sfd import score_identity_loss
from gentrain.models.adapters import Adapter
from gentrain.models.control import CONTROL, Form
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path, TimeLaw
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.rewards.base import Reward
from gentrain.rewards.closed_form import Brightness
from gentrain.samplers.euler import Euler
from gentrain.samplers.one_step import OneStep
from gentrain.training.run import load_run

TAU2 = 0.3
V = 1 + TAU2  # variance of c


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def fidelity(a: Tensor, b: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
    """KL of the student's and the data's laws of alpha x + sigma eps, the condition averaged out."""
    student, data = alpha**2 * (a**2 * V + b**2) + sigma**2, alpha**2 + sigma**2
    return 0.5 * (student / data - 1 - (student / data).log())


def condition(a: Tensor, b: Tensor) -> Tensor:
    """E |c - x|^2 / (2 tau^2)."""
    return ((1 - a) ** 2 * V + b**2) / (2 * TAU2)


def joint(a: Tensor, b: Tensor) -> Tensor:
    """KL(p(c) p_G(x | c) || p(x) p(c | x)) from the covariances of (x, c)."""
    student = torch.stack([torch.stack([a**2 * V + b**2, a * V]), torch.stack([a * V, torch.tensor(V, dtype=torch.float64)])])
    data = torch.tensor([[1.0, 1.0], [1.0, V]], dtype=torch.float64)
    return 0.5 * ((torch.linalg.inv(data) @ student).trace() - 2 - torch.logdet(student) + torch.logdet(data))


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.9), (0.77, 0.48), (1.2, 0.1)])
def test_the_joint_divergence_is_fidelity_plus_condition_less_the_conditional_entropy(a: float, b: float) -> None:
    a, b = number(a), number(b)
    student = a**2 * V + b**2
    # H(c | x) = H(c, x) - H(x) of the student's joint law
    entropy = 0.5 * (2 * math.pi * math.e * V * b**2 / student).log()
    log_likelihood = -condition(a, b) - 0.5 * math.log(2 * math.pi * TAU2)
    assert abs(joint(a, b) - (fidelity(a, b) - log_likelihood - entropy)).item() < 1e-10


def test_with_a_fake_score_that_sees_the_control_the_entropy_is_back() -> None:
    """The mean over c of KL(p_G(x | c) || p(x)), plus condition, less H(c), is the joint divergence."""
    a, b = number(0.3), number(0.9)
    of_each = 0.5 * (b**2 + a**2 * V - 1 - (b**2).log())
    entropy = 0.5 * math.log(2 * math.pi * math.e * V)
    assert abs(joint(a, b) - (of_each + condition(a, b) + 0.5 * math.log(2 * math.pi * TAU2) - entropy)).item() < 1e-10


def test_the_gradient_of_the_bound_is_that_of_the_closed_form() -> None:
    """At a noise level, with exact scores; the fake one is that of the student's marginal law, which does not see c."""
    alpha, sigma, count = 0.8, 0.6, 200_000
    a, b = number(0.5), number(0.7)
    generator = torch.Generator().manual_seed(0)
    c, z, eps = (torch.randn(count, 1, dtype=torch.float64, generator=generator) for _ in range(3))
    c = c * V**0.5
    x = a * c + b * z
    x_t = (alpha * x + sigma * eps).detach()

    def denoised(variance: float) -> Tensor:
        return alpha * variance / (alpha**2 * variance + sigma**2) * x_t

    marginal = (a**2 * V + b**2).item()
    loss = pseudo_target_loss(x, alpha**2 / sigma**2 * (denoised(marginal) - denoised(1.0))) + condition_loss(c, x, TAU2**0.5).mean()
    got = torch.stack(torch.autograd.grad(loss, (a, b)))
    expected = torch.stack(torch.autograd.grad(fidelity(a, b, alpha, sigma) + condition(a, b), (a, b)))
    assert torch.cosine_similarity(got, expected, 0) > 0.99
    assert got.norm().item() == pytest.approx(expected.norm().item(), rel=0.05)


def least_of_the_bound(weight: float = 1.0) -> float:
    """a, where b = 0: the root of a^2 (V + V weight / tau^2) - a V weight / tau^2 - 1 = 0."""
    pull = V * weight / TAU2
    return (pull + (pull**2 + 4 * (V + pull)) ** 0.5) / (2 * (V + pull))


def test_what_the_bound_costs() -> None:
    """The joint divergence is least at the posterior; the bound, whatever the condition's weight, where nothing is left of z."""
    a, b = number(1 / V), number((TAU2 / V) ** 0.5)
    gradient = torch.autograd.grad(joint(a, b), (a, b))
    assert joint(a, b).item() == pytest.approx(0, abs=1e-12) and max(g.abs().item() for g in gradient) < 1e-12
    for weight in (1.0, 0.1):
        a, b = number(0.5), number(0.7)
        optimizer = torch.optim.Adam([a, b], lr=0.02)
        for _ in range(1500):
            optimizer.zero_grad()
            (fidelity(a, b) + weight * condition(a, b)).backward()
            optimizer.step()
        assert abs(b.item()) < 1e-3
        assert a.item() == pytest.approx(least_of_the_bound(weight), abs=1e-4)


def test_condition_loss_is_minus_the_log_likelihood() -> None:
    c, h = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    loss = condition_loss(c, h, 0.7)
    log_p = torch.distributions.Normal(h, 0.7).log_prob(c).sum((1, 2))
    torch.testing.assert_close(loss - loss[0], -(log_p - log_p[0]))
    loss.sum().backward()
    torch.testing.assert_close(h.grad, (h.detach() - c) / 0.49)


def test_decoupled_guidance_with_one_time_and_weight_is_the_tied_one() -> None:
    fake, conditional, null = (torch.randn(5, 2, 3, dtype=torch.float64) for _ in range(3))
    weight, w = torch.rand(5, dtype=torch.float64), 2.5
    guided = null + w * (conditional - null)
    torch.testing.assert_close(
        decoupled_guidance(fake, conditional, conditional, null, w - 1, weight, weight),
        weight[:, None, None] * (fake - guided),
        rtol=1e-6,
        atol=1e-12,
    )


def test_each_bracket_has_its_own_weight_per_row() -> None:
    one = torch.ones(2, 1, dtype=torch.float64)
    got = decoupled_guidance(3 * one, one, 5 * one, 2 * one, 0.5, torch.tensor([1.0, 10.0]), torch.tensor([100.0, 1000.0]))
    torch.testing.assert_close(got, torch.tensor([[2.0 - 150], [20.0 - 1500]], dtype=torch.float64))


# --- the method -------------------------------------------------------------------------------------------------------------

PATH, SIGMA, AT = RectifiedFlow(), 2.5, 0.4  # all scores are compared at this time
ALPHA_T, SIGMA_T = 1 - AT, AT


@register("test_itself")
@dataclass
class Itself(Extractor):
    """The sample itself, with noise of variance TAU2."""

    def form(self, shape: tuple[int, ...]) -> Form:
        return Form(shape)

    def read(self, x: Tensor, networks: Any) -> Tensor:
        return x

    def loss(self, control: Tensor, x: Tensor, networks: Any) -> Tensor:
        return condition_loss(control, x, TAU2**0.5)


@register("test_at")
@dataclass
class At(TimeLaw):
    """Always the same time."""

    t: float = AT

    def sample(self, uniform: Tensor, path: Path) -> Tensor:
        return torch.full_like(uniform, self.t)


@dataclass
class Linear(Reward):
    """slope x."""

    slope: float = 1.0

    def __call__(self, images: Tensor, asked: Any, networks: Any) -> Tensor:
        return self.slope * images.squeeze(1)


class Student(nn.Module):
    """x = a c + b z + m, given sigma(t) z at the time where sigma / alpha = t / (1 - t) is `sigma`."""

    def __init__(self, a: float = 0.5, b: float = 0.7, m: float = 0.0, sigma: float = SIGMA):
        super().__init__()
        self.a, self.b, self.m = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (a, b, m))
        self.start = sigma / (1 + sigma)

    def forward(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        assert set(condition) == {CONTROL}
        torch.testing.assert_close(t, torch.full_like(t, 1000 * self.start))
        return self.a * condition[CONTROL] + self.b * x / self.start + self.m


class Exact(nn.Module):
    """E[x0 | x_t] where x0 ~ N(mean c + shift, variance) with the control it is given, or without one N(shift, variance)."""

    def __init__(self, variance: float, mean: float | None = None, shift: float = 0.0):
        super().__init__()
        self.variance, self.mean, self.seen = variance, mean, []
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        self.seen.append(condition)
        alpha, sigma = 1 - t[:, None] / 1000, t[:, None] / 1000
        mean = self.shift + (0.0 if self.mean is None else self.mean * condition[CONTROL])
        return mean + alpha * self.variance / (alpha**2 * self.variance + sigma**2) * (x - alpha * mean)


def nets_of(**roles: nn.Module) -> Any:
    return SimpleNamespace(**{name: Denoiser(network, PATH, "x0") for name, network in roles.items()}, decode=lambda x: x)


def jdm(**values: Any) -> JDM:
    return JDM(**{"control": Itself(), "generator_loss": "vsd", "times": At(), **values})


def batch_of(count: int) -> dict[str, Tensor]:
    """Items whose control, themselves, is of the data's law N(0, 1 + TAU2)."""
    rows = torch.arange(count)
    return {"x": Noise(7, rows).normal((count, 1), torch.float64) * V**0.5}


def loss_of(method: JDM, nets: Any, count: int) -> Any:
    return method.student_loss(nets, batch_of(count), Noise(1, torch.arange(count)))


def weighed_fidelity(a: Tensor, b: Tensor) -> Tensor:
    """What vsd descends: sigma^2 / alpha times the divergence at AT, of which alpha (fake - teacher) is the gradient."""
    return SIGMA_T**2 / ALPHA_T * fidelity(a, b, ALPHA_T, SIGMA_T)


def given_control(a: Tensor, b: Tensor) -> Tensor:
    """E over c of the divergence of N(a c, b^2) from N(0, 1), both noised to AT, times sigma^2 / alpha."""
    student, data = ALPHA_T**2 * b**2 + SIGMA_T**2, ALPHA_T**2 + SIGMA_T**2
    return SIGMA_T**2 / ALPHA_T * 0.5 * (student / data + ALPHA_T**2 * a**2 * V / data - 1 - (student / data).log())


@pytest.mark.parametrize("conditioning", ["marginal", "control"])
def test_the_student_descends_the_closed_form(conditioning: str) -> None:
    """With exact scores. The fake score that sees the control descends another objective: of each control's own law."""
    student = Student()
    a, b = student.a.item(), student.b.item()
    fake = Exact(a**2 * V + b**2) if conditioning == "marginal" else Exact(b**2, mean=a)
    nets = nets_of(student=student, teacher=Exact(1.0), fake_score=fake)
    loss_of(jdm(condition_weight=0.3, fake_score_conditioning=conditioning), nets, 200_000).value.backward()
    got = torch.stack([student.a.grad, student.b.grad])
    objectives = {"marginal": weighed_fidelity, "control": given_control}
    found = {}
    for name, objective in objectives.items():
        at = number(a), number(b)
        found[name] = torch.stack(torch.autograd.grad(objective(*at) + 0.3 * condition(*at), at))
    assert torch.cosine_similarity(got, found[conditioning], 0) > 0.999
    assert got.norm().item() == pytest.approx(found[conditioning].norm().item(), rel=0.02)
    other = found["control" if conditioning == "marginal" else "marginal"]
    assert got.norm().item() != pytest.approx(other.norm().item(), rel=0.02)


@pytest.mark.parametrize("conditioning", ["marginal", "control"])
def test_the_method_stands_still_where_the_closed_forms_say(conditioning: str) -> None:
    """Almost without noise, where its terms are in nats: the bound at b = 0, with a fake score that sees the control at the posterior."""
    t, places = 0.02, {"marginal": (least_of_the_bound(), 0.0), "control": (1 / V, (TAU2 / V) ** 0.5)}
    found = {}
    for name, (a, b) in places.items():
        student = Student(a, b)
        fake = Exact(a**2 * V + b**2) if conditioning == "marginal" else Exact(b**2, mean=a)
        method = jdm(condition_weight=t**2 / (1 - t), fake_score_conditioning=conditioning, times=At(t=t))
        loss_of(method, nets_of(student=student, teacher=Exact(1.0), fake_score=fake), 200_000).value.backward()
        found[name] = torch.stack([student.a.grad, student.b.grad]).norm().item() / (t**2 / (1 - t))
    other = "control" if conditioning == "marginal" else "marginal"
    assert found[conditioning] < 0.02 * found[other]  # measured: .0001 and .003 of it


def test_each_term_has_the_sign_and_the_scale_that_is_said() -> None:
    """Fidelity alone, condition alone: their gradients add up, each per coordinate of a sample."""
    got = {}
    for weight in (0.0, 1.0, 3.0):
        student = Student()
        loss_of(jdm(condition_weight=weight), nets_of(student=student, teacher=Exact(1.0), fake_score=Exact(0.8)), 1000).value.backward()
        got[weight] = torch.stack([student.a.grad, student.b.grad])
    torch.testing.assert_close(got[3.0] - got[0.0], 3 * (got[1.0] - got[0.0]))
    # by hand: c - x, of which the gradient of |c - x|^2 / (2 tau^2) is - (c - x) / tau^2 times that of x
    c, z = batch_of(1000)["x"], Noise(1, torch.arange(1000)).normal((1000, 1))
    error = -(c - (0.5 * c + 0.7 * z)) / TAU2
    torch.testing.assert_close(got[1.0] - got[0.0], torch.stack([(error * c).mean(), (error * z).mean()]))


@pytest.mark.parametrize("sigma", [2.5, 1.5])
def test_nothing_but_the_student_gets_a_gradient_and_none_passes_through_scores(sigma: float) -> None:
    student, teacher, fake = Student(sigma=sigma), Exact(1.0), Exact(0.8)
    loss_of(jdm(sigma=sigma), nets_of(student=student, teacher=teacher, fake_score=fake), 50).value.backward()
    assert teacher.shift.grad is None and fake.shift.grad is None
    c, z, eps = batch_of(50)["x"], *_draws(50)
    x = (0.5 * c + 0.7 * z).requires_grad_()
    x_t = ALPHA_T * x + SIGMA_T * eps
    gradient = ALPHA_T * (fake(x_t, torch.full((50,), 1000 * AT)) - teacher(x_t, torch.full((50,), 1000 * AT))) - (c - x) / TAU2
    torch.testing.assert_close(student.b.grad, (gradient * z).mean())


def _draws(count: int) -> tuple[Tensor, Tensor]:
    """(z, eps) as the losses draw them."""
    noise = Noise(1, torch.arange(count))
    z = noise.normal((count, 1))
    noise.uniform((count,))
    return z, noise.normal((count, 1))


def test_the_teacher_and_a_marginal_fake_score_never_see_the_control() -> None:
    for conditioning, sees in (("marginal", False), ("control", True)):
        student, teacher = Student(), Exact(1.0)
        fake = Exact(0.8, mean=0.5 if sees else None)
        method, nets = jdm(fake_score_conditioning=conditioning), nets_of(student=student, teacher=teacher, fake_score=fake)
        loss_of(method, nets, 20)
        method.fake_score_loss(nets, batch_of(20), Noise(1, torch.arange(20)))
        assert all(seen is None or CONTROL not in seen for seen in teacher.seen)
        assert len(fake.seen) == 2 and all((seen is not None and CONTROL in seen) == sees for seen in fake.seen)
        assert (method.roles["fake_score"].control is not None) == sees


def test_what_the_teacher_knows_goes_to_it_and_the_control_does_not() -> None:
    """A known label is kept by all, the model that makes noised samples sharp too; a control that is the label is kept from all but one."""
    seen: dict[str, Any] = {}

    def network(name: str) -> Any:
        def call(x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
            seen[name] = condition
            return x * 0.5

        return call

    roles = ("student", "teacher", "fake_score", "consistency")
    for control, known in ((DownSampling(factor=2), {"label"}), (_label(), set())):
        nets: Any = SimpleNamespace(**{name: Denoiser(network(name), PATH, "x0") for name in roles})
        nets.decode, nets.judge = lambda x: x, lambda x: x.flatten(1)[:, :3]
        batch = {"x": torch.rand(4, 1, 2, 2), "label": torch.arange(4) % 3}
        JDM(control=control, condition_at="noisy").student_loss(nets, batch, Noise(1, torch.arange(4)))
        assert set(seen["student"]) == {CONTROL, *known}
        assert all(set(seen[name] or {}) == known for name in roles[1:])


def _label() -> Extractor:
    label = Label()
    label.check_data(Mixture(components=3))
    return label


def test_noise_has_nothing_to_do_with_the_items() -> None:
    """The same rows with other items: the same z, other controls."""
    student, nets = Student(a=0.0), None
    nets = nets_of(student=student, teacher=Exact(1.0), fake_score=Exact(0.8))
    method, noise = jdm(), lambda: Noise(1, torch.arange(30))
    one, other = batch_of(30), {"x": batch_of(30)["x"].flip(0)}
    drawn = [method._draw(nets, batch, noise(), batch["x"]) for batch in (one, other)]
    assert torch.equal(*drawn)
    z, _ = _draws(30)
    torch.testing.assert_close(drawn[0], 0.7 * z.double())


@pytest.mark.parametrize(("prediction", "sigma"), [("x0", 2.5), ("velocity", 1.5)])
def test_the_fake_score_learns_to_denoise_what_the_student_draws(prediction: Any, sigma: float) -> None:
    """In what its network predicts, x0 or eps - x0."""
    student, fake = Student(sigma=sigma), Exact(0.8)
    nets = nets_of(student=student, teacher=Exact(1.0))
    nets.fake_score = Denoiser(fake, PATH, prediction)
    loss = jdm(sigma=sigma).fake_score_loss(nets, batch_of(50), Noise(1, torch.arange(50)))
    loss.value.backward()
    assert student.a.grad is None and fake.shift.grad is not None
    z, eps = _draws(50)
    x = 0.5 * batch_of(50)["x"] + 0.7 * z
    x_t = ALPHA_T * x + SIGMA_T * eps
    truth = x if prediction == "x0" else eps - x
    expected = (ALPHA_T * 0.8 / (ALPHA_T**2 * 0.8 + SIGMA_T**2) * x_t - truth).square().mean()
    torch.testing.assert_close(loss.value, expected.detach(), check_dtype=False)


def test_a_linear_reward_moves_the_mean_to_where_it_balances_the_divergence() -> None:
    """sigma^2 / alpha KL of N(m, .) from N(0, 1) at AT has the slope sigma^2 alpha m / (alpha^2 + sigma^2); the reward slope / beta."""
    slope, beta = 0.6, 4.0
    m = slope / beta * (ALPHA_T**2 + SIGMA_T**2) / (SIGMA_T**2 * ALPHA_T)
    for place, still in ((m, True), (0.0, False), (2 * m, False)):
        student = Student(a=0.0, b=1.0, m=place)
        nets = nets_of(student=student, teacher=Exact(1.0), fake_score=Exact(1.0, shift=place))
        found = loss_of(jdm(condition_weight=0.0, reward=Linear(slope=slope), reward_temperature=beta), nets, 20_000)
        found.value.backward()
        assert (abs(student.m.grad.item()) < 0.05 * slope / beta) == still
        assert (student.m.grad.item() < 0) == (place < m) or still  # descent raises a mean that is too low
        assert found.logs["reward"].item() == pytest.approx(slope * place, abs=0.02)


def test_the_noisy_condition_term_reads_what_the_consistency_model_makes_of_the_noised_sample() -> None:
    student, consistency = Student(), Exact(0.9)
    method = jdm(condition_at="noisy", condition_weight=2.0)
    assert "consistency" in method.roles and "consistency" not in jdm().roles
    nets = nets_of(student=student, teacher=Exact(0.8), fake_score=Exact(0.8), consistency=consistency)
    loss_of(method, nets, 40).value.backward()
    z, eps = _draws(40)
    c = batch_of(40)["x"]
    gain = ALPHA_T * 0.9 / (ALPHA_T**2 * 0.9 + SIGMA_T**2)
    read = gain * (ALPHA_T * (0.5 * c + 0.7 * z) + SIGMA_T * eps)
    torch.testing.assert_close(student.b.grad, (2 * -(c - read) / TAU2 * gain * ALPHA_T * z).mean(), rtol=1e-5, atol=0)


def test_score_identity_as_fidelity() -> None:
    student, teacher, fake = Student(), Exact(1.0), Exact(0.8)
    loss = loss_of(jdm(generator_loss="sid", condition_weight=0.0), nets_of(student=student, teacher=teacher, fake_score=fake), 40)
    loss.value.backward()
    b = number(0.7)
    z, eps = _draws(40)
    x = 0.5 * batch_of(40)["x"] + b * z
    t = torch.full((40,), 1000 * AT)
    x_t = ALPHA_T * x + SIGMA_T * eps
    score_identity_loss(x, teacher(x_t, t), fake(x_t, t), 1.2).mean().backward()
    torch.testing.assert_close(student.b.grad, b.grad)


@pytest.mark.parametrize("apart", [False, True])
def test_guidance_by_what_the_teacher_knows(apart: bool) -> None:
    """Tied: the teacher's guided prediction. Apart: a bracket of its own, at a time and with noise of its own."""
    w, other = 3.0, 0.7
    known = torch.arange(30) % 2

    def teacher(x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        label = torch.full((len(x),), -1) if condition is None else condition["label"]
        return x * 0.5 + torch.where(label < 0, 0.0, 0.3 + label)[:, None]

    student = Student()
    plain = student.forward
    student.forward = lambda x, t, condition: plain(x, t, {CONTROL: condition[CONTROL]})  # type: ignore[method-assign]
    nets = nets_of(student=student, fake_score=Exact(0.8))
    nets.teacher = Denoiser(teacher, PATH, "x0")
    method = jdm(guidance=w, guidance_times=At(t=other) if apart else None, condition_weight=0.0)
    batch, noise = {**batch_of(30), "label": known}, Noise(1, torch.arange(30))
    method.student_loss(nets, batch, noise).value.backward()
    z, eps = _draws(30)
    x_t = ALPHA_T * (0.5 * batch["x"] + 0.7 * z) + SIGMA_T * eps
    fake = ALPHA_T * 0.8 / (ALPHA_T**2 * 0.8 + SIGMA_T**2) * x_t
    conditional, push = 0.5 * x_t + (0.3 + known)[:, None], (0.3 + known)[:, None]
    if apart:
        gradient = ALPHA_T * (fake - conditional) - (w - 1) * (1 - other) * push
    else:
        gradient = ALPHA_T * (fake - conditional - (w - 1) * push)
    torch.testing.assert_close(student.b.grad, (gradient * z).mean())


def test_dmd_divides_by_the_teachers_error() -> None:
    student, teacher = Student(), Exact(1.0)
    nets = nets_of(student=student, teacher=teacher, fake_score=Exact(0.8))
    loss_of(jdm(generator_loss="dmd", condition_weight=0.0), nets, 40).value.backward()
    z, eps = _draws(40)
    x = 0.5 * batch_of(40)["x"] + 0.7 * z
    x_t = ALPHA_T * x + SIGMA_T * eps
    gain = {v: ALPHA_T * v / (ALPHA_T**2 * v + SIGMA_T**2) for v in (0.8, 1.0)}
    gradient = (gain[0.8] - gain[1.0]) * x_t / ((x - gain[1.0] * x_t).abs() + 1e-6)
    torch.testing.assert_close(student.b.grad, (gradient * z).mean(), rtol=1e-5, atol=0)


def test_the_student_keeps_its_turn() -> None:
    turns = [[update.role for update in jdm(student_every=3).updates(Clock(64 * step, 64, 6400))] for step in range(6)]
    assert turns == [["fake_score"], ["fake_score"], ["fake_score", "student"]] * 2


# --- what the configuration refuses -----------------------------------------------------------------------------------------


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="guidance in its teacher"):
        jdm(generator_loss="sid", guidance=2.0, guidance_times=At())
    with pytest.raises(ConfigError, match="guidance 1 is none") as caught:
        jdm(guidance_times=At())
    assert caught.value.key == "guidance_times"
    with pytest.raises(ConfigError, match="knows none to guide by") as caught:
        jdm(control=Label(), guidance=2.0)
    assert caught.value.key == "guidance"
    with pytest.raises(ConfigError, match="neither classes nor captions") as caught:
        jdm(control=Signs(), guidance=2.0).check_data(Unlabelled(data=Mixture()))
    assert caught.value.key == "guidance"
    jdm(control=Signs(), guidance=2.0, guidance_times=At()).check_data(Mixture())
    with pytest.raises(ConfigError, match="signs is for vectors"):
        JDM(control=Signs()).check_data(SimpleNamespace(shape=(1, 8, 8), registered_name="digits"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="images"):
        jdm(control=Signs(), reward=Brightness()).check_data(Mixture())
    with pytest.raises(ValueError, match="one step"):
        jdm().check_sampler(Euler())
    jdm().check_sampler(OneStep())


RUN = """
method: {name: jdm, control: CONTROL}
data: DATA
model: mlp
roles: {teacher: {weights: runs/none}}
training: {samples: 64}
"""


@pytest.mark.parametrize(
    ("control", "data", "message"),
    [
        ("down_sampling", "mixture", "images with 1 or 3 channels"),
        ("label", "{name: unlabelled, data: mixture}", "needs data with classes"),
        ("nothing", "mixture", "nothing"),
        ("{name: down_sampling, factor: 3}", "digits", "no multiples"),
        ("grey_scale", "digits", "grey themselves"),
    ],
)
def test_a_control_that_the_data_do_not_have_is_told(tmp_path: FilePath, control: str, data: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RUN.replace("CONTROL", control).replace("DATA", data))
    with pytest.raises(ConfigError, match=message) as caught:
        load_run(file, ["roles.judge.weights=runs/none"] if control == "label" else [])
    assert "method.control" in str(caught.value)


def test_the_branch_alone_learns_unless_the_configuration_says_otherwise(tmp_path: FilePath) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RUN.replace("CONTROL", "signs").replace("DATA", "mixture"))
    run = load_run(file)
    assert run.part_of("student") == r"^control\." and run.part_of("fake_score") is None
    assert load_run(file, ["roles.student.trainable=output"]).part_of("student") == "output"
    adapted = load_run(file, ["adapter={rank: 2}"])
    assert adapted.part_of("student") == r"^control\." and adapted.part_of("fake_score") == Adapter(rank=2)
    assert load_run(file, ["trainable=output"]).part_of("student") == r"^control\."
    assert load_run(file, ["roles.student.adapter={rank: 0}"]).part_of("student") is None  # the whole network


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("roles.student.adapter={rank: 2}", "roles.student.adapter"),
        ("roles.fake_score.adapter={rank: 2}", "roles.fake_score.adapter"),
        ("adapter={rank: 2}", "adapter"),  # of the fake score
    ],
)
def test_an_adapter_without_the_branch_of_a_control_is_refused(tmp_path: FilePath, override: str, key: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RUN.replace("CONTROL", "signs").replace("DATA", "mixture"))
    with pytest.raises(ConfigError, match="reads the control") as caught:
        load_run(file, [override, "method.fake_score_conditioning=control"])
    assert caught.value.key == key


def test_of_a_flow_too_and_of_noise_consistency_the_branch_alone_learns(tmp_path: FilePath) -> None:
    file = tmp_path / "run.yaml"
    for method, role in (("flow_matching", "model"), ("noise_consistency", "student")):
        given = {"flow_matching": "model", "noise_consistency": "teacher"}[method]
        text = RUN.replace("CONTROL", "signs").replace("DATA", "mixture").replace("jdm", method).replace("teacher", given)
        file.write_text(text)
        assert load_run(file, ["adapter={rank: 2}"]).part_of(role) == r"^control\."
