"""Divergences against quadrature in float64; the optimum of a linear reward for each of them (closed form, sampled by no one)."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from scipy.integrate import quad
from scipy.special import lambertw
from torch import Tensor

from gentrain.config import ConfigError
from gentrain.methods.rocm import ROCM, kernel_divergence, reduced, strongest_pull
from gentrain.samplers.consistency import Consistency
from gentrain.samplers.ddim import DDIM
from gentrain.samplers.lcm import LCM
from tests.methods.rewarded import ALPHA, SIGMA, SLOPE, TWO, Curved, Of, Shifted, batch_of, nets_of, noise_of

A = 0.7
FORMULAS = [(name, 0.5) for name in ("kl", "jeffreys", "fisher", "hellinger", "js", "tv", "chi2")]
FORMULAS += [("amari", 0.3), ("amari", 1.7), ("amari", -1.0)]


def densities(x: float, q: float, sigma: float) -> tuple[float, float]:
    def normal(mean: float) -> float:
        return math.exp(-(((x - mean) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))

    return normal(q * sigma), normal(0.0)


def integrand(name: str, p: float, r: float, q: float, sigma: float, alpha: float) -> float:
    """From the divergence's definition, not from any closed form."""
    if p == 0 or r == 0:
        return 0.0
    middle = (p + r) / 2
    return {
        "kl": lambda: p * math.log(p / r),
        "jeffreys": lambda: (p - r) * math.log(p / r),
        "fisher": lambda: p * (q / sigma) ** 2,
        "hellinger": lambda: (math.sqrt(p) - math.sqrt(r)) ** 2 / 2,
        "js": lambda: (p * math.log(p / middle) + r * math.log(r / middle)) / 2,
        "tv": lambda: abs(p - r) / 2,
        "chi2": lambda: (p - r) ** 2 / r,
        "amari": lambda: (p**alpha * r ** (1 - alpha) - p) / (alpha * (alpha - 1)),
    }[name]()


@pytest.mark.parametrize("q", [0.05, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("name, alpha", FORMULAS)
def test_divergences_are_the_integrals_that_define_them(name: Any, alpha: float, q: float) -> None:
    sigma = 0.8
    ends = (-14 * sigma - 3 * q, 14 * sigma + 3 * q)
    expected = quad(
        lambda x: integrand(name, *densities(x, q, sigma), q, sigma, alpha), *ends, limit=400, points=[0, q * sigma / 2, q * sigma]
    )[0]
    m = torch.tensor(q**2, dtype=torch.float64, requires_grad=True)
    found = kernel_divergence(name, m, sigma, alpha)
    assert found.item() == pytest.approx(expected, rel=1e-7, abs=1e-9)
    (slope,) = torch.autograd.grad(found, m)
    low, high = (kernel_divergence(name, m.detach() + d, sigma, alpha).item() for d in (-1e-5, 1e-5))
    assert slope.item() == pytest.approx((high - low) / 2e-5, rel=1e-5)


def test_divergences_at_no_shift_and_far_away() -> None:
    """Values and gradients are finite in float32; at 0 the gradient by m is half the curvature in q."""
    slopes = {"kl": 1 / 2, "jeffreys": 1, "fisher": 4, "hellinger": 1 / 8, "js": 1 / 8, "chi2": 1, "amari": 1 / 2}
    for name, slope in slopes.items():
        m = torch.zeros(2, requires_grad=True)
        value = kernel_divergence(name, m, 0.5)  # type: ignore[arg-type]
        value.sum().backward()
        assert value.abs().max() < 1e-7
        torch.testing.assert_close(m.grad, torch.full((2,), float(slope)))
    far = torch.tensor([65.0, 400.0, 1e4], requires_grad=True)
    for name, limit in (("hellinger", 1.0), ("js", math.log(2)), ("tv", 1.0)):
        value = kernel_divergence(name, far)  # type: ignore[arg-type]
        torch.testing.assert_close(value, torch.full((3,), limit), rtol=1e-3, atol=0)
        value.sum().backward()
    assert far.grad is not None and far.grad.isfinite().all()
    torch.testing.assert_close(kernel_divergence("amari", far, alpha=1.0), far / 2)
    with pytest.raises(ValueError, match="fisher needs sigma"):
        kernel_divergence("fisher", far)
    with pytest.raises(ValueError, match="no divergence 'bhattacharyya'; there are: kl"):
        kernel_divergence("bhattacharyya", far)  # type: ignore[arg-type]


@pytest.mark.parametrize("name, alpha", [("hellinger", 0.5), ("js", 0.5), ("tv", 0.5), ("amari", 0.3)])
def test_the_strongest_pull(name: Any, alpha: float) -> None:
    q = torch.linspace(1e-3, 6, 6000, dtype=torch.float64, requires_grad=True)
    (pull,) = torch.autograd.grad(kernel_divergence(name, q**2, alpha=alpha).sum(), q)
    assert q[pull.argmax()].item() == pytest.approx(strongest_pull(name, alpha), abs=2e-3)
    expected = {"hellinger": 0.30327, "js": 0.23366, "tv": 0.39894}
    assert pull.max().item() == pytest.approx(expected.get(name, pull.max().item()), abs=1e-5)
    assert strongest_pull("kl") is None and strongest_pull("amari", 1.5) is None


def test_reductions() -> None:
    squares = torch.arange(24.0).reshape(2, 3, 4)
    total = squares.sum((1, 2))
    for name, divisor in (("sum", 1.0), ("mean", 12.0), ("root", 12**0.5)):
        torch.testing.assert_close(reduced(squares, name), total / divisor)  # type: ignore[arg-type]


def linear(x: Tensor) -> Tensor:
    return A * x[:, 0]


def method(**fields: Any) -> ROCM:
    return ROCM(**{"reward": Of(linear), "sampler": TWO, "reduction": "sum", "last_step": "skip", **fields})


def climb(divergence: str, beta: float, steps: int, lr: float, **fields: Any) -> float:
    """q of the first jump after so many steps of Adam on the method's loss."""
    network = Shifted()
    nets, rocm = nets_of(model=network, reference=Shifted()), method(divergence=divergence, beta=beta, **fields)
    optimizer = torch.optim.Adam([network.shift], lr=lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.02 ** (1 / steps))
    for step in range(steps):
        optimizer.zero_grad()
        rocm.loss(nets, batch_of(2), noise_of(2, step)).value.backward()
        optimizer.step()
        schedule.step()
    return ALPHA * network.shift.item() / SIGMA


@pytest.mark.parametrize("divergence", ["kl", "kl_reference", "jeffreys", "fisher", "chi2", "hellinger", "amari"])
def test_the_optimum_of_a_linear_reward(divergence: str) -> None:
    """d phi / dq = kappa = a slope sigma / beta, solved by hand; the specification's numbers stand behind."""
    beta = 2.5
    kappa = A * SLOPE * SIGMA / beta
    expected = {
        "kl": kappa, "kl_reference": kappa, "jeffreys": kappa / 2, "fisher": kappa * SIGMA**2 / 2,
        "chi2": math.sqrt(lambertw(kappa**2 / 2).real / 2),
        "hellinger": math.sqrt(-4 * lambertw(-4 * kappa**2).real),
        "amari": math.sqrt(-4 * lambertw(-(kappa**2) / 4).real),
    }  # fmt: skip
    specified = {"kl": 0.269573, "fisher": 0.097361, "chi2": 0.132443, "hellinger": 1.357716}
    assert expected[divergence] == pytest.approx(specified.get(divergence, expected[divergence]), abs=1e-5)
    steps, lr = (250, 0.15) if divergence == "hellinger" else (150, 0.05)
    assert climb(divergence, beta, steps, lr) == pytest.approx(expected[divergence], abs=1e-3)


def test_bounded_divergences_run_away() -> None:
    """js at a slope that kl holds; hellinger at beta = 1, where kl rests at 0.674."""
    assert climb("js", 2.5, 100, 1.0) > 8
    assert climb("hellinger", 1.0, 100, 1.0) > 8
    assert climb("kl", 1.0, 150, 0.1) == pytest.approx(0.673934, abs=1e-3)


def test_a_linear_reward_tilts_the_law() -> None:
    """E x_0 moves by a / beta times the variance of x_0 given x_1, that of the noise which can be steered: 0.25953."""
    q = climb("kl", 2.5, 150, 0.05)
    assert SLOPE * SIGMA * q == pytest.approx(A / 2.5 * SLOPE**2 * SIGMA**2, abs=1e-3)
    assert SLOPE * SIGMA * q == pytest.approx(0.25953, abs=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_quadratic_reward_moves_the_mean_and_not_the_variance(seed: int) -> None:
    k, b, beta = 1.5, 2.0, 2.5
    network = Shifted(tilted=True)
    nets = nets_of(model=network, reference=Shifted())
    rocm = method(reward=Of(lambda x: -k / 2 * (x[:, 0] - b).square()), beta=beta)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.02 ** (1 / 150))
    for step in range(150):
        optimizer.zero_grad()
        rocm.loss(nets, batch_of(1024), noise_of(1024, 1000 * seed + step)).value.backward()
        optimizer.step()
        schedule.step()
    x1 = torch.tensor([[-1.0], [0.3], [1.5]], dtype=torch.float64)
    means = []
    for name in ("model", "reference"):
        first = TWO.jump(getattr(nets, name), x1, 0)
        means.append(TWO.jump(getattr(nets, name), first.mean, 1).x0)
    variance = SLOPE**2 * SIGMA**2
    expected = (means[1] * beta / variance + k * b) / (k + beta / variance)
    torch.testing.assert_close(means[0], expected, rtol=0.03, atol=0)


@pytest.mark.parametrize("last_step", ["skip", "renoise"])
def test_a_free_last_jump_is_held_by_renoise_alone(last_step: str) -> None:
    """N = 1: the optimum is f + a sigma^2 / (beta alpha^2) of the node, which the specification gives; skipped, nothing holds it."""
    network = Shifted()
    one, beta = LCM(steps=1), 50.0
    nets, rocm = nets_of(model=network, reference=Shifted()), method(sampler=one, beta=beta, last_step=last_step)
    jump = one.jump(nets.model, torch.zeros(1, 1), 0)
    optimum = A * jump.sigma**2 / (beta * jump.alpha**2)
    network.shift.data.fill_(optimum)
    rocm.loss(nets, batch_of(2), noise_of(2)).value.backward()
    assert network.shift.grad is not None
    assert network.shift.grad.item() == pytest.approx(0.0 if last_step == "renoise" else -A, abs=1e-6)


def curved_reward(x: Tensor) -> Tensor:
    return (x * torch.tensor([1.0, -0.5, 0.3])).sum(1).sin() + 0.1 * x.square().sum(1)


CASES: list[dict[str, Any]] = [
    {"divergence": "kl"}, {"divergence": "kl_reference"}, {"divergence": "fisher"}, {"divergence": "js"}, {"divergence": "tv"},
    {"divergence": "chi2", "reduction": "mean"}, {"divergence": "kl", "sampler": DDIM(steps=3, eta=1.0)},
    {"divergence": "hellinger", "sampler": Consistency(steps=3), "reduction": "root"}, {"divergence": "kl", "last_step": "skip"},
]  # fmt: skip


@pytest.mark.parametrize("fields", CASES)
def test_the_gradient_is_that_of_the_loss(fields: dict[str, Any]) -> None:
    """Against finite differences in float64 along a random direction of all weights: through every jump, every state, the reference too."""
    network, batch = Curved(0), batch_of(6, 3)
    nets = nets_of(model=network, reference=Curved(1))
    rocm = method(reward=Of(curved_reward), beta=0.3, **{"last_step": "renoise", "sampler": LCM(steps=3), **fields})
    rocm.loss(nets, batch, noise_of(6)).value.backward()
    directions = [torch.randn_like(p) for p in network.parameters()]
    found = sum((p.grad * d).sum().item() for p, d in zip(network.parameters(), directions, strict=True))

    def at(step: float) -> float:
        with torch.no_grad():
            for p, d in zip(network.parameters(), directions, strict=True):
                p += step * d
            value = rocm.loss(nets, batch, noise_of(6)).value.item()
            for p, d in zip(network.parameters(), directions, strict=True):
                p -= step * d
        return value

    h = 1e-4
    expected = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    assert found == pytest.approx(expected, rel=1e-6)


def test_truncation_leaves_the_last_jumps() -> None:
    """f = w x, two jumps: d x_0 / d w is x_2 with one, x_2 + w alpha x_1 with both."""

    class Line(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(0.8, dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
            return self.w * x.double()

    network = Line()
    nets, noise = nets_of(model=network, reference=Line()), noise_of(5)
    x1, z = noise.normal((5, 1)).double(), noise.normal((5, 1)).double()
    x2 = ALPHA * 0.8 * x1 + SIGMA * z
    for last, slope in ((1, x2), (2, x2 + 0.8 * ALPHA * x1), (None, x2 + 0.8 * ALPHA * x1)):
        network.zero_grad()
        method(beta=0.0, bptt_k=last).loss(nets, batch_of(5), noise_of(5)).value.backward()
        assert network.w.grad is not None
        assert network.w.grad.item() == pytest.approx(-A * slope.mean().item(), rel=1e-5)


def test_at_its_beginning_nothing_is_shifted() -> None:
    logs = method(last_step="renoise").loss(nets_of(model=Curved(0), reference=Curved(0)), batch_of(4, 3), noise_of(4)).logs
    assert (logs["divergence"], logs["q_1"], logs["q_2"]) == (0, 0, 0)
    logs = method(last_step="renoise").loss(nets_of(model=Curved(1), reference=Curved(0)), batch_of(4, 3), noise_of(4)).logs
    assert logs["divergence"] > logs["divergence_last"] > 0 and not any(value.requires_grad for value in logs.values())


def test_a_bounded_divergence_that_fails_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        bounded = method(divergence="hellinger", reduction="mean")
    assert "hellinger is bounded" in caplog.text and "saturates" not in caplog.text
    caplog.clear()
    for q in (1.9, 2.1, 2.2):
        assert bounded.diverged({"q_1": 0.1, "q_2": q}) is None
    assert [record.message for record in caplog.records] == [
        "q_2 = 2.1 is beyond 2, where the pull of hellinger is greatest: it holds this reward no longer. Raise beta, or take kl"
    ]
    caplog.clear()
    method(divergence="kl").diverged({"q_1": 1e9})
    assert not caplog.records


def test_jumps_without_noise_are_refused() -> None:
    with pytest.raises(ConfigError, match="rocm needs jumps with noise: set eta to 1"):
        method(sampler=DDIM(steps=4))
