"""Noise consistency: levels of noise, both distances, where gradients flow, and the multiplier that holds the boundary."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gentrain.data.toys import Mixture
from gentrain.extractors.closed_form import Signs
from gentrain.extractors.label import Label
from gentrain.methods.base import Clock
from gentrain.methods.noise_consistency import NoiseConsistency, diffused, dual_loss
from gentrain.models.control import CONTROL
from gentrain.models.denoiser import Denoiser
from gentrain.models.multiplier import Multiplier
from gentrain.noise import Noise
from gentrain.paths.dual import Dual
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.training.optimizers import decay_groups

PATH = RectifiedFlow()
ROWS = torch.arange(6)


class Steered(nn.Module):
    """x = b z + a c, where it is given a control; z comes times t, at the time where sigma / alpha = t / (1 - t) is `sigma`."""

    def __init__(self, a: float, b: float, sigma: float = 2.5):
        super().__init__()
        self.start = sigma / (1 + sigma)
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))
        self.seen: list[Any] = []

    def forward(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        self.seen.append(condition)
        torch.testing.assert_close(t, torch.full_like(t, 1000 * self.start))
        control = (condition or {}).get(CONTROL, torch.zeros(len(x)))
        return self.b * x / self.start + self.a * control.reshape(len(x), -1)


def nets_of(student: Steered, teacher: Steered) -> Any:
    multiplier = Multiplier().build((2,), 0)
    seen = {"student": Denoiser(student, PATH, "x0"), "teacher": Denoiser(teacher, PATH, "x0")}
    return SimpleNamespace(**seen, multiplier=multiplier, decode=lambda x: x)


def draws(levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """(z, eps, level) as the loss draws them."""
    noise = Noise(3, ROWS)
    return noise.normal((6, 2)), noise.normal((6, 2)), noise.randint(0, levels, (6,)).float()


def test_diffused_noise_is_of_the_law_of_noise() -> None:
    z, eps = (torch.randn(100_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for sigma in (0.0, 0.3, 1.0):
        mixed = diffused(z, eps, torch.full((100_000,), sigma, dtype=torch.float64))
        assert mixed.std().item() == pytest.approx(1, abs=0.01)
        assert (mixed * z).mean().item() == pytest.approx((1 - sigma**2) ** 0.5, abs=0.01)
    assert torch.equal(diffused(z, eps, torch.ones(100_000)), eps)


@pytest.mark.parametrize(("distance", "at"), [("huber", 2.5), ("l2", 1.5)])
def test_the_loss_by_hand(distance: Any, at: float) -> None:
    method = NoiseConsistency(control=Signs(), levels=4, distance=distance, sigma=at)
    student, teacher = Steered(0.3, 0.8, at), Steered(9.0, 1.1, at)
    nets = nets_of(student, teacher)
    loss = method.student_loss(nets, {"x": torch.zeros(6, 2)}, Noise(3, ROWS))
    loss.value.backward()
    z, eps, level = draws(4)
    x, c = 1.1 * z, (1.1 * z).sign()
    a, b = torch.tensor(0.3, requires_grad=True), torch.tensor(0.8, requires_grad=True)
    sigma = ((level + 1) / 4)[:, None], (level / 4)[:, None]
    farther, nearer = ((1 - s**2).clamp(min=0).sqrt() * z + s * eps for s in sigma)

    def d(p: Tensor, q: Tensor) -> Tensor:
        square = (p - q).square().sum(1)
        return (square / 2).mean() if distance == "l2" else (((square + 2 * 0.00054**2).sqrt() - 0.00054 * 2**0.5) / 2**0.5).mean()

    fixed = (b * nearer + a * c).detach()  # nothing flows through the nearer level
    expected = d(b * farther + a * c, fixed) + d(b * z + a * c, x)  # lambda = 1 at first
    expected.backward()
    torch.testing.assert_close(loss.value, expected)
    torch.testing.assert_close((student.a.grad, student.b.grad), (a.grad, b.grad))
    assert loss.logs["multiplier"].item() == pytest.approx(1, abs=1e-6)
    assert teacher.b.grad is None and nets.multiplier.raw.grad is None
    assert teacher.seen == [None]  # the generator knows no control


def test_what_the_generator_knows_goes_to_both_and_the_control_to_the_student() -> None:
    """A label and an embedded prompt go to both, in both losses; a control that is the label is shown to the student alone."""
    batch = {"x": torch.zeros(6, 2), "label": ROWS % 3, "condition/text": torch.randn(6, 4)}
    label = Label()
    label.check_data(Mixture(components=3))
    for control in (Signs(), label):
        known = {} if control is label else {"label": batch["label"], "text": batch["condition/text"]}
        method, nets = NoiseConsistency(control=control), nets_of(Steered(0.3, 0.8), Steered(0.0, 1.1))
        nets.judge = lambda x: x.repeat(1, 2)[:, :3]
        method.student_loss(nets, batch, Noise(3, ROWS))
        method.multiplier_loss(nets, batch, Noise(3, ROWS))
        student, teacher = nets.student.network.seen, nets.teacher.network.seen
        assert (len(student), len(teacher)) == (4, 2)
        for seen, own in [*((each, {CONTROL}) for each in student), *((each or {}, set()) for each in teacher)]:
            assert set(seen) == {*known, *own}
            assert all(torch.equal(seen[key], value) for key, value in known.items())


def test_the_multiplier_rises_while_the_boundary_is_farther_than_the_margin_and_falls_else() -> None:
    for margin, rises in ((0.01, True), (5.0, False)):
        nets = nets_of(Steered(0.3, 0.8), Steered(0.0, 1.1))
        nets.multiplier.raw.requires_grad_(True)
        loss = NoiseConsistency(control=Signs(), margin=margin).multiplier_loss(nets, {"x": torch.zeros(6, 2)}, Noise(3, ROWS))
        loss.value.backward()
        assert (nets.multiplier.raw.grad.item() < 0) == rises  # descent goes against the gradient
        assert nets.student.network.b.grad is None
    multiplier, boundary = torch.tensor(2.0, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    dual_loss(multiplier, boundary, 0.2).backward()
    assert multiplier.grad.item() == pytest.approx(-0.3) and boundary.grad is None


def test_a_generator_that_is_already_steered_right_stays_at_the_boundary() -> None:
    """f(z, c) = f(z): the boundary's distance is 0, and the control is not obeyed for other noise. The sum says so."""
    same = nets_of(Steered(0.0, 1.1), Steered(0.0, 1.1))
    method = NoiseConsistency(control=Signs(), levels=4)
    logs = method.student_loss(same, {"x": torch.zeros(6, 2)}, Noise(3, ROWS)).logs
    assert logs["boundary"].item() == 0 and logs["consistency"].item() > 0.05


def test_noise_whose_sum_is_of_another_law_is_refused() -> None:
    with pytest.raises(ValueError, match="only a normal law"):
        NoiseConsistency(control=Signs()).check(RectifiedFlow(space=Dual()))
    NoiseConsistency(control=Signs()).check(RectifiedFlow(space=Dual(nu=float("inf"))))


def test_no_decay_pulls_the_multiplier_down() -> None:
    assert [group["weight_decay"] for group in decay_groups(Multiplier().build((2,), 0).parameters())] == [0.0]


def test_the_student_learns_before_the_multiplier() -> None:
    method = NoiseConsistency(control=Signs())
    assert [update.role for update in method.updates(Clock(0, 64, 640))] == ["student", "multiplier"]
    assert method.roles["student"].control is method.control and method.roles["student"].trainable == r"^control\."
