"""Guidance of a student that is led by scores: tied to their times, and decoupled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gentrain.methods.distribution_matching import DistributionMatching, GeneratorLoss, divergence_weight, logits_of
from gentrain.noise import Noise
from gentrain.paths.times import LogNormal
from tests.methods.test_distribution_matching import Alone, by_hand, gradients, loss_of, nets_of
from tests.methods.toy import TinyNetwork, batch_of, noise_of


@pytest.mark.parametrize("name", ["vsd", "dmd", "js"])
def test_decoupled_guidance_has_times_and_weights_of_its_own(name: GeneratorLoss) -> None:
    """A divergence weighs all of a row's gradient, guidance too: its h multiplies the difference of the GUIDED teacher's score."""
    law = LogNormal(mean=1.0, std=0.5)
    nets, method = nets_of(), DistributionMatching(generator_loss=name, guidance=2.5, guidance_times=law)
    value = loss_of(method, "student", nets)
    with torch.no_grad():
        x_g, x_t, t, _, condition = by_hand(nets, method)
        noise = noise_of(16)
        noise.normal((16, 2))
        bins = (10 * noise.uniform((16,))).long()
        noise.normal((16, 2))
        s = law.sample(noise.uniform((16,)), nets.student.path)
        x_s = nets.student.path.perturb(x_g, noise.normal((16, 2)), s)
        teacher, conditional = nets.teacher.x0(x_t, t, condition), nets.teacher.x0(x_s, s, condition)
        null = nets.teacher.x0(x_s, s, {"label": torch.full((16,), -1)})
        places = ((s, conditional), (t, teacher))
        there, here = ((1 - at) if name == "vsd" else 1 / ((x_g - x0).abs().mean(1) + 1e-6) for at, x0 in places)
        gradient = here[:, None] * (nets.fake_score.x0(x_t, t, condition) - teacher) - 1.5 * there[:, None] * (conditional - null)
        if name == "js":
            gradient *= divergence_weight("js", logits_of(nets.critic.raw(x_t, t, condition)), bins, Alone())[:, None]
    torch.testing.assert_close(value.detach(), gradient.square().mean() / 2)


class Augmented(TinyNetwork):
    """Also told what was done to the image, by two numbers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        told = 0 if condition is None or "augment" not in condition else condition["augment"]
        return super().forward(x + told, t, condition)


class Once(Noise):
    """Whatever is drawn first of a shape is drawn again each time."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.drawn: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def normal(self, shape: tuple[int, ...], *more: Any) -> Tensor:
        return self.drawn.setdefault(("normal", shape), super().normal(shape, *more))

    def uniform(self, shape: tuple[int, ...], *more: Any) -> Tensor:
        return self.drawn.setdefault(("uniform", shape), super().uniform(shape, *more))


def test_at_one_time_and_weight_it_is_the_tied_one_whatever_else_the_teacher_is_told() -> None:
    """The null is without what guides alone: of an augmented image the teacher is told the augmentation in both terms."""
    law, found = LogNormal(mean=0.0, std=1.0), []
    batch = {**batch_of(16), "condition/augment": batch_of(16, start=16)["x"]}
    for fields in ({}, {"guidance_times": law}):
        nets = nets_of(**{name: Augmented(seed) for seed, name in enumerate(("teacher", "fake_score", "student"))})
        method = DistributionMatching(generator_loss="vsd", guidance=2.5, times=law, **fields)
        value = method.student_loss(nets, batch, Once(1, torch.arange(16))).value
        value.backward()
        found.append((value.detach(), *gradients(nets, "student")))
    for tied, decoupled in zip(*found, strict=True):
        torch.testing.assert_close(decoupled, tied, rtol=1e-4, atol=1e-7)
    assert found[0][0] > 1e-3
