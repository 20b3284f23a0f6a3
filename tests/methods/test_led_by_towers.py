"""Towers of picture and text lead a generator of pictures: each method that follows a reward's gradient."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gentrain.methods.base import Loss
from gentrain.methods.draft import DRaFT
from gentrain.methods.reward_guided_lcd import RewardGuidedLCD
from gentrain.methods.rocm import ROCM
from gentrain.models.towers import Towers
from gentrain.rewards.networks import TowerSimilarity
from tests.methods.captioned import CaptionedPatches
from tests.methods.rewarded import TWO, nets_of, noise_of

B = 6
ROLES = {"reward_guided_lcd": ("student", "target", "teacher"), "rocm": ("model", "reference"), "draft": ("model",)}


class Scaled(nn.Module):
    """f = w x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.4))

    def forward(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        return self.w * x.float()


def loss_of(name: str, reward: TowerSimilarity, scale: float = 5.0) -> Callable[..., Loss]:
    if name == "reward_guided_lcd":
        return RewardGuidedLCD(reward=reward, guidance=(1, 1), reward_scale=scale).student_loss
    return (
        ROCM(reward=reward, sampler=TWO, reward_scale=scale, beta=0.1).loss
        if name == "rocm"
        else DRaFT(reward=reward, sampler=TWO, bptt_k=None).loss
    )


@pytest.mark.parametrize("name", ROLES)
def test_the_gradient_of_what_the_towers_say_reaches_the_generator(name: str) -> None:
    torch.manual_seed(0)
    model, items = Towers(width=8, channels=(8,), norm_groups=2, buckets=64), CaptionedPatches().split("train")
    reward = TowerSimilarity(model=model)
    reward.check_data(CaptionedPatches())
    towers = model.build((3, 6, 6), 0).eval().requires_grad_(False)
    batch = {**items.batch(torch.arange(B)), "index": torch.arange(B)}  # type: ignore[attr-defined]
    batch.pop("label")
    networks = {role: Scaled() for role in ROLES[name]}
    for other in ROLES[name][1:]:
        nn.init.constant_(networks[other].w.requires_grad_(False), 0.6)
    generator = networks[ROLES[name][0]]

    def nets(**roles: nn.Module) -> SimpleNamespace:
        return SimpleNamespace(**vars(nets_of(**roles)) | {"decode": lambda x: x, "towers": towers})

    def loss(asked: dict[str, Tensor] = batch, scale: float = 5.0) -> Loss:
        return loss_of(name, reward, scale)(nets(**networks), asked, noise_of(B))

    loss().value.backward()
    assert generator.w.grad is not None
    found, values = generator.w.grad.item(), []
    for step in (1e-3, -2e-3):
        generator.w.data += step
        values.append(loss().value.item())
    generator.w.data += 1e-3
    assert found == pytest.approx((values[0] - values[1]) / 2e-3, rel=0.02)
    told, less = loss().logs["reward"], loss(scale=1.0).value
    if name == "draft":
        assert less.item() == pytest.approx(-told.item())
    else:
        assert (loss().value - less).item() == pytest.approx(-4 * told.item(), rel=1e-4)
    assert abs(loss({**batch, "caption": batch["caption"].flip(0)}).logs["reward"] - told) > 1e-3  # each picture with its own text
