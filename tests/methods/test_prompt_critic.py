"""The critic of pictures and prompts: its loss written out, where gradients flow, what the configuration refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gentrain.config import ConfigError, Document
from gentrain.methods.base import Clock
from gentrain.methods.distribution_matching import DistributionMatching
from gentrain.methods.prompt_critic import PromptCritic, prompt_critic_loss, prompt_student_loss
from gentrain.models.denoiser import Denoiser
from gentrain.models.towers import Towers
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.training.run import parse_run
from gentrain.training.world import RankGroup
from tests.methods.captioned import CaptionedPatches
from tests.methods.toy import noise_of

SCALE, BIAS = 1.3, -0.7
MODEL = {"width": 8, "channels": [8], "norm_groups": 2, "buckets": 64}


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def towers(x: Tensor, tokens: Tensor) -> Tensor:
    """Pictures and prompts that are their own embeddings."""
    return torch.cat([x, tokens, torch.tensor([SCALE, BIAS], dtype=torch.float64).expand(len(x), 2)], 1)


def logit(image: Tensor, text: Tensor) -> Tensor:
    return torch.tensor(SCALE).exp().double() * torch.cosine_similarity(image, text, dim=0) + BIAS


def test_data_match_their_prompts_and_drawn_pictures_match_none() -> None:
    real, drawn, text, place = rows(4, 0), rows(4, 1), rows(4, 2), torch.tensor([3, 1, 3, 0])
    expected, right = torch.zeros((), dtype=torch.float64), 0
    for i in range(4):
        for j in range(4):
            y = 1 if place[i] == place[j] else -1
            expected = expected - torch.nn.functional.logsigmoid(y * logit(real[i], text[j]))
            expected = expected - torch.nn.functional.logsigmoid(-logit(drawn[i], text[j]))
        right += int(logit(real[i], text[i]) > 0) + int(logit(drawn[i], text[i]) < 0)
    value, share = prompt_critic_loss(towers, real, drawn, text, place, RankGroup(1))
    torch.testing.assert_close(value, expected / 8)
    assert share.item() == pytest.approx(right / 8)


def test_the_student_raises_the_logits_of_its_own_prompts() -> None:
    drawn, text = rows(4, 1), rows(4, 2)
    expected = -sum(torch.nn.functional.logsigmoid(logit(drawn[i], text[i])) for i in range(4)) / 4
    torch.testing.assert_close(prompt_student_loss(towers, drawn, text), expected)


class Patches(torch.nn.Module):
    """A student whose picture is a weight times its noise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        return self.weight * x


def method_and_nets(**critic: Any) -> tuple[DistributionMatching, SimpleNamespace, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Towers(width=8, channels=(8,), norm_groups=2, buckets=64, initial_bias=-1.0)
    method = DistributionMatching(prompt_critic=PromptCritic(towers=model, **critic))
    data = CaptionedPatches()
    method.check_data(data)
    nets = {name: Denoiser(Patches(), RectifiedFlow(), "velocity") for name in ("teacher", "fake_score", "student")}
    network = model.build(data.shape, 0)
    items = data.split("train").batch(torch.arange(6))
    batch = {"x": items["x"], "caption": items["caption"], "index": torch.arange(6)}
    return method, SimpleNamespace(**nets, prompt_critic=network, group=RankGroup(1), decode=lambda x: x), batch


def test_the_critic_learns_and_the_student_does_not() -> None:
    method, nets, batch = method_and_nets()
    loss = method.prompt_critic_loss(nets, batch, noise_of(6))
    loss.value.backward()
    assert nets.student.network.weight.grad is None
    assert all(p.grad is not None for p in nets.prompt_critic.parameters())
    assert 0 <= loss.logs["prompt_critic_right"] <= 1


def test_the_student_follows_the_critic_by_its_weight() -> None:
    gradients = []
    for weight in (0.5, 1.5):
        method, nets, batch = method_and_nets(weight=weight)
        nets.prompt_critic.requires_grad_(False)
        method.student_loss(nets, batch, noise_of(6)).value.backward()
        gradients.append(nets.student.network.weight.grad.clone())
    alone, (_, nets, batch) = DistributionMatching(), method_and_nets()
    alone.student_loss(nets, batch, noise_of(6)).value.backward()
    plain = nets.student.network.weight.grad
    torch.testing.assert_close(gradients[1] - plain, 3 * (gradients[0] - plain))
    assert (gradients[0] - plain).abs() > 1e-6


def test_its_role_learns_before_the_student() -> None:
    method = DistributionMatching(prompt_critic=PromptCritic())
    assert [update.role for update in method.updates(Clock(0, 4, 40))] == ["fake_score", "prompt_critic", "student"]
    assert method.roles["prompt_critic"].model == method.prompt_critic.towers  # type: ignore[union-attr]
    assert "prompt_critic" not in DistributionMatching().roles


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "method": {"name": "distribution_matching", "prompt_critic": {"towers": MODEL}},
        "data": CaptionedPatches.registered_name,
        "model": "unet",
        "roles": {"teacher": {"weights": "runs/teacher"}},
        "engine": "torch",
        "training": {"samples": 64, "batch_size": 16},
    } | changes


def test_mistakes_are_told() -> None:
    assert set(parse_run(Document(settings(), "x.yaml")).method.roles) == {"teacher", "fake_score", "student", "prompt_critic"}
    with pytest.raises(ConfigError, match="the critic looks at images, spiral has samples of shape") as caught:
        parse_run(Document(settings(data="spiral", model="mlp"), "x.yaml"))
    assert caught.value.key == "method.prompt_critic"
