"""Rewards whose gradients are weighed against each other, and the penalty that keeps a critic's logits small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gentrain.config import ConfigError, register
from gentrain.rewards.balanced import Balanced, gramians
from gentrain.rewards.base import Asked, Networks, Reward
from gentrain.rewards.ensemble import Sum, Weighted


@register("along")
@dataclass
class Along(Reward):
    """The part of each row along a direction."""

    direction: tuple[float, ...] = (1.0, 0.0)
    range = (-10.0, 10.0)

    def __call__(self, images: Tensor, asked: Asked, networks: Networks) -> Tensor:
        return images.flatten(1) @ images.new_tensor(self.direction)


@register("flat_reward")
@dataclass
class Flat(Reward):
    range = (0.0, 1.0)

    def __call__(self, images: Tensor, asked: Asked, networks: Networks) -> Tensor:
        return images.new_zeros(len(images)).requires_grad_()


@register("blind_reward")
@dataclass
class Blind(Along):
    differentiable = False


def parts(*directions: tuple[float, ...], weights: tuple[float, ...] = (1.0, 1.0, 1.0)) -> dict[str, Weighted]:
    return {f"r{i}": Weighted(Along(direction), weight) for i, (direction, weight) in enumerate(zip(directions, weights))}


def gradient_of(reward: Reward, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(reward(2 * x, {}, {}).sum(), x)  # the images are not leaves, as a sampler's are not
    return found / 2


AT_ODDS = [(1.0, 0.0), (-0.8, 0.6)]


def test_no_reward_is_led_against_and_their_sum_would_do_that() -> None:
    x, directions = torch.randn(5, 2), torch.tensor([(2.0, 0.0), (-0.9, 0.1)])
    rewards = parts((2.0, 0.0), (-0.9, 0.1))
    plain, balanced = (gradient_of(kind(rewards), x) for kind in (Sum, Balanced))
    assert ((plain @ directions.T).min() < -0.5) and (balanced @ directions.T).min() > -1e-3
    assert balanced.norm(dim=1).min() > 0.05


def test_upgrad_is_the_sum_of_the_projections_of_each() -> None:
    """Of two at odds each is projected off the other (arXiv:2406.16232, section 3); their sum is what comes out."""
    a, b = (torch.tensor(direction) for direction in AT_ODDS)
    expected = (a - (a @ b) / (b @ b) * b) + (b - (a @ b) / (a @ a) * a)
    torch.testing.assert_close(gradient_of(Balanced(parts(*AT_ODDS)), torch.randn(3, 2)), expected.expand(3, 2), atol=1e-3, rtol=1e-3)


def test_rewards_that_agree_are_added_with_their_weights() -> None:
    agree = parts((1.0, 0.2), (0.3, 1.0), weights=(2.0, 0.5))
    x = torch.randn(4, 2)
    torch.testing.assert_close(gradient_of(Balanced(agree), x), gradient_of(Sum(agree), x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(Balanced(agree)(x, {}, {}), Sum(agree)(x, {}, {}), atol=1e-4, rtol=1e-4)


@dataclass
class Sphere(Reward):
    """Towards a point: its gradient differs from row to row."""

    to: float = 1.0
    range = (-100.0, 0.0)

    def __call__(self, images: Tensor, asked: Asked, networks: Networks) -> Tensor:
        return -(images - self.to).square().flatten(1).sum(1)


def test_a_rows_reward_depends_on_that_row_alone_up_to_the_scale_of_all() -> None:
    rewards = {"a": Weighted(Sphere(1.0)), "b": Weighted(Sphere(-1.0))}
    x = torch.randn(6, 3)
    whole = Balanced(rewards)(x, {}, {})
    single = torch.cat([Balanced(rewards)(x[i : i + 1], {}, {}) for i in range(6)])
    torch.testing.assert_close(whole, single, atol=2e-3, rtol=2e-3)
    assert not Balanced(rewards)(x, {}, {}).requires_grad


@pytest.mark.parametrize("by", ["mgda", "pcgrad", "aligned_mtl"])
def test_other_weightings_do_something_of_their_own(by: Any) -> None:
    """Of two, pcgrad does what upgrad does; of three not."""
    three, x = parts((2.0, 0.0, 0.1), (-0.9, 0.4, 0.0), (-0.5, -0.6, 0.3)), torch.randn(2, 3)
    found, usual = gradient_of(Balanced(three, by), x), gradient_of(Balanced(three), x)
    assert found.isfinite().all() and (found - usual).abs().max() > 1e-2
    if by == "mgda":  # the least element of the convex hull: of two, orthogonal to the line through both
        two = gradient_of(Balanced(parts((2.0, 0.0), (-0.9, 0.4)), by), torch.randn(2, 2))
        assert abs(two[0] @ torch.tensor([2.9, -0.4])) < 1e-2


def test_a_reward_without_a_gradient_here_does_no_harm() -> None:
    rewards = {"a": Weighted(Along()), "b": Weighted(Flat())}
    torch.testing.assert_close(gradient_of(Balanced(rewards), torch.randn(2, 2)), torch.tensor([1.0, 0]).expand(2, 2), atol=1e-3, rtol=1e-3)


def test_a_plan_whose_tensors_hold_no_numbers_passes() -> None:
    with FakeTensorMode():
        x = torch.zeros(4, 2, requires_grad=True)
        Balanced(parts(*AT_ODDS))(2 * x, {}, {}).sum().backward()
        assert x.grad is not None


def test_gramians_have_the_inner_products_of_each_row() -> None:
    g = torch.randn(3, 4, 2, 5)
    found = gramians(g)
    product = torch.einsum("kbij,lbij->bkl", g, g).double()
    torch.testing.assert_close(found * product[0, 0, 0] / found[0, 0, 0], product, rtol=1e-5, atol=1e-6)
    assert found.diagonal(dim1=1, dim2=2).mean().item() == pytest.approx(1)


def test_what_cannot_be_weighed_is_refused() -> None:
    with pytest.raises(ConfigError, match="one reward has nothing to be weighed against"):
        Balanced({"a": Weighted(Along())})
    with pytest.raises(ConfigError, match=r"rewards\.b: it has no gradient to be weighed; take `sum`"):
        Balanced({"a": Weighted(Along()), "b": Weighted(Blind())})
