"""The terms of joint distribution matching against linear-Gaussian laws, where everything is known in closed form.

Data x ~ N(0, 1), condition c | x ~ N(x, TAU2), student x = a c + b z with z ~ N(0, 1) and c of the data's law N(0, 1 + TAU2).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gentrain.methods.distribution_matching import pseudo_target_loss
from gentrain.methods.jdm import condition_loss, decoupled_guidance

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
        # b = 0 and the root of a^2 (V + V weight / tau^2) - a V weight / tau^2 - 1 = 0
        pull = V * weight / TAU2
        assert abs(b.item()) < 1e-3
        assert a.item() == pytest.approx((pull + (pull**2 + 4 * (V + pull)) ** 0.5) / (2 * (V + pull)), abs=1e-4)


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
