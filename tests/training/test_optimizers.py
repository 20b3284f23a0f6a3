"""Optimisers do what their fields say; schedules are functions of the clock."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gentrain.methods.base import Clock
from gentrain.training.optimizers import SGD, AdamW, Constant, Cosine, Optimizer


def _step(optimizer: Optimizer, weight: float, gradients: list[float]) -> float:
    parameter = nn.Parameter(torch.tensor([weight]))
    built = optimizer.build([parameter])
    for gradient in gradients:
        parameter.grad = torch.tensor([gradient])
        built.step()
    return parameter.item()


@pytest.mark.parametrize("lr, beta1, beta2, eps, decay", [(0.1, 0.9, 0.999, 1e-8, 0.0), (0.02, 0.5, 0.9, 0.1, 0.3)])
def test_adamw_is_that_of_the_paper(lr: float, beta1: float, beta2: float, eps: float, decay: float) -> None:
    weight, m, v = 2.0, 0.0, 0.0
    gradients = [0.5, -2.0, 1.0]
    for step, gradient in enumerate(gradients, 1):
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        weight -= lr * decay * weight
        weight -= lr * (m / (1 - beta1**step)) / (math.sqrt(v / (1 - beta2**step)) + eps)
    built = AdamW(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay)
    assert _step(built, 2.0, gradients) == pytest.approx(weight, rel=1e-5)


@pytest.mark.parametrize("momentum, decay", [(0.0, 0.0), (0.9, 0.0), (0.5, 0.2)])
def test_sgd_is_heavy_ball_with_decay_in_the_gradient(momentum: float, decay: float) -> None:
    weight, velocity = 2.0, 0.0
    for gradient in [0.5, -2.0, 1.0]:
        velocity = momentum * velocity + gradient + decay * weight
        weight -= 0.1 * velocity
    assert _step(SGD(lr=0.1, momentum=momentum, weight_decay=decay), 2.0, [0.5, -2.0, 1.0]) == pytest.approx(weight, rel=1e-5)


def test_every_optimiser_says_what_it_needs_of_a_parameter() -> None:
    assert {name: entry.needs for name, entry in Optimizer.available().items() if entry.__module__.startswith("gentrain.")} == {
        "adamw": "elementwise",
        "sgd": "elementwise",
    }


def test_warmup_ends_at_the_peak_and_then_stays() -> None:
    factors = [Constant(warmup=30).factor(Clock(samples, 10, 100)) for samples in range(0, 100, 10)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1])
    assert Constant().factor(Clock(0, 10, 100)) == 1


def test_cosine_after_the_warmup() -> None:
    schedule = Cosine(warmup=20, final=0.1)
    for samples in range(0, 100, 10):
        ramp = min(1, (samples + 10) / 20)
        angle = math.pi * max(0, samples - 20) / 80
        assert schedule.factor(Clock(samples, 10, 100)) == pytest.approx(ramp * (0.1 + 0.9 * (1 + math.cos(angle)) / 2))
    assert Cosine(final=0.25).factor(Clock(100, 10, 100)) == pytest.approx(0.25)
    assert Cosine(final=0.25).factor(Clock(1000, 10, 100)) == pytest.approx(0.25)  # past the end of a run that was made shorter


def test_a_warmup_longer_than_the_run_only_ramps() -> None:
    assert Cosine(warmup=200).factor(Clock(90, 10, 100)) == pytest.approx(0.5)
