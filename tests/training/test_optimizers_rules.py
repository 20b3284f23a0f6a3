"""Update rules written here, and one whose result is not the weights, against their papers transcribed into NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from torch import nn

from gentrain.training.optimizers import Averaging
from tests.training.test_optimizers_table import entry, problem, walk

Array = np.ndarray[Any, Any]


def adamomentum(x: Array, gradients: Array, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> Iterator[Array]:
    m = v = np.zeros_like(x)
    for t, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * m**2 + eps
        x = (1 - lr * weight_decay) * x - lr * (m / (1 - beta1**t)) / np.sqrt(v / (1 - beta2**t))
        yield x


def nag_gs(x: Array, gradients: Array, lr: float, mu: float, gamma: float) -> Iterator[Array]:
    """As in the paper, a step begins with x and gamma and then asks for the gradient; v = x at first, so that x_1 is the start."""
    v = x
    for g in gradients:
        x = (x + lr * v) / (1 + lr)
        gamma = (gamma + lr * mu) / (1 + lr)
        v = (lr * mu * x + gamma * v - lr * g) / (lr * mu + gamma)  # of (v' - v) gamma = a (mu (x - v') - g)
        yield (x + lr * v) / (1 + lr)  # where the next gradient is taken


def optimistic_amsgrad(x: Array, gradients: Array, lr: float, beta1: float, beta2: float, eps: float) -> Iterator[Array]:
    theta = guess = np.zeros_like(x)
    v = largest = np.full_like(x, eps)
    half = x
    for g in gradients:
        before, theta = theta, beta1 * theta + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * (g - guess) ** 2
        largest = np.maximum(largest, v)
        half = half - lr * theta / np.sqrt(largest)
        guess = g
        yield half - lr * (beta1 * before + (1 - beta1) * guess) / np.sqrt(largest)


def dog(x: Array, gradients: Array, lr: float, initial: float, eps: float, weight_decay: float) -> Iterator[Array]:
    start, total, radius = x, 0.0, initial * (1 + np.linalg.norm(x))
    for g in gradients:
        radius = max(radius, np.linalg.norm(x - start))
        total += np.sum(g**2)
        x = x - lr * radius / np.sqrt(total + eps) * (g + weight_decay * x)
        yield x


def prodigy(
    x: Array, gradients: Array, lr: float, beta1: float, beta2: float, eps: float, d0: float, weight_decay: float
) -> Iterator[Array]:
    start, d, r = x, d0, 0.0
    m = v = s = np.zeros_like(x)
    for g in gradients:
        m = beta1 * m + (1 - beta1) * d * g
        v = beta2 * v + (1 - beta2) * d**2 * g**2
        r = np.sqrt(beta2) * r + (1 - np.sqrt(beta2)) * lr * d**2 * (g @ (start - x))
        s = np.sqrt(beta2) * s + (1 - np.sqrt(beta2)) * lr * d**2 * g
        x = (1 - lr * d * weight_decay) * x - lr * d * m / (np.sqrt(v) + d * eps)
        d = max(d, r / np.abs(s).sum())
        yield x


def schedule_free(
    x: Array, gradients: Array, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, of: str = "y"
) -> Iterator[Array]:
    z = y = x
    v, weights = np.zeros_like(x), 0.0
    for t, g in enumerate(gradients, 1):
        v = beta2 * v + (1 - beta2) * g**2
        z = z - lr * g / (np.sqrt(v / (1 - beta2**t)) + eps) - lr * weight_decay * y
        weights += lr**2
        x = x + lr**2 / weights * (z - x)
        y = (1 - beta1) * z + beta1 * x
        yield y if of == "y" else x


PAPERS: dict[str, tuple[Callable[..., Iterator[Array]], list[dict[str, float]]]] = {
    "adamomentum": (adamomentum, [{"weight_decay": 0.0}, {"lr": 0.1, "beta1": 0.5, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.3}]),
    "nag_gs": (nag_gs, [{}, {"lr": 0.5, "mu": 3.0, "gamma": 0.7}]),
    "optimistic_amsgrad": (optimistic_amsgrad, [{}, {"lr": 0.1, "beta1": 0.5, "beta2": 0.9, "eps": 1e-3}]),
    "dog": (dog, [{}, {"lr": 0.5, "initial": 0.2, "eps": 1.0, "weight_decay": 0.3}]),
    "schedule_free": (schedule_free, [{}, {"lr": 0.1, "beta1": 0.7, "beta2": 0.9, "eps": 0.1, "weight_decay": 0.3}]),
    "prodigy": (prodigy, [{}, {"lr": 0.5, "beta1": 0.5, "beta2": 0.8, "eps": 0.1, "d0": 0.1, "weight_decay": 0.3}]),
}


@pytest.mark.parametrize("name, fields", [(name, fields) for name, (_, cases) in PAPERS.items() for fields in cases])
def test_a_rule_is_that_of_its_paper(name: str, fields: dict[str, float]) -> None:
    start, gradients = problem()
    expected = list(PAPERS[name][0](start.double().numpy(), gradients.double().numpy(), **vars(entry(name, **fields))))
    for steps in (1, 2, len(gradients)):
        found = walk(entry(name, **fields), start, gradients[:steps], shaped=True)
        np.testing.assert_allclose(found.numpy(), expected[steps - 1], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("fields", PAPERS["schedule_free"][1])
def test_the_average_of_schedule_free_is_that_of_its_paper(fields: dict[str, float]) -> None:
    start, gradients = problem()
    optimizer, p = entry("schedule_free", **fields), nn.Parameter(start.clone())
    built = optimizer.build([p])
    assert isinstance(built, Averaging)
    expected = schedule_free(start.double().numpy(), gradients.double().numpy(), **vars(optimizer), of="x")
    for gradient, x in zip(gradients, expected, strict=True):
        p.grad = gradient.clone()
        built.step()
        np.testing.assert_allclose(built.average(p).numpy(), x, rtol=2e-5, atol=2e-6)
