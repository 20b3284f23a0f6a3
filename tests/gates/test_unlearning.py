"""Score forgetting distillation makes a ring of eight normal laws lose one of them: its label gives the neighbour, the others stay.

A teacher of 3,000 steps, 1,000 alternating steps of `sfd`, 4,000 one-step samples of the student's average for each of: the forgotten
label, all the others. A sample counts as of the law whose mean is nearest; off-manifold: further than four deviations from every mean.
The thresholds are given in advance (learning rates of 1e-4 and 5e-5, terms of weight 0.1, alpha 1.2). Measured
over seeds 0 to 2: forget 0.0003, 0 and 0; override 0.9998, 1 and 0.982; remain 1, 1 and 0.997; off-manifold 0.004, 0.010 and 0.052.
"""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from gentrain.data.toys import Mixture
from gentrain.methods.base import Clock, Method
from gentrain.methods.diffusion import Diffusion
from gentrain.methods.sfd import ScoreForgetting
from gentrain.models.denoiser import Denoiser
from gentrain.models.mlp import MLP
from gentrain.noise import Noise, derive
from gentrain.paths.variance_preserving import VariancePreserving

DATA, PATH = Mixture(radius=1.0), VariancePreserving()
TEACHER_STEPS, STEPS, BATCH, SAMPLES, DECAY = 3000, 1000, 256, 4000, 0.99


def network(like: torch.nn.Module | None = None) -> torch.nn.Module:
    made = MLP().build((2,), 8)
    if like is not None:
        made.load_state_dict(like.state_dict())
    return made


def teacher_of(seed: int) -> Denoiser:
    """A plain loop: Adam with a learning rate that falls to zero, which serves here as the average of the weights would."""
    torch.manual_seed(seed)
    net, items = network(), Mixture(radius=1.0, seed=seed).split("train")
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TEACHER_STEPS)
    nets, method = SimpleNamespace(model=Denoiser(net, PATH, "eps")), Diffusion()
    for step in range(TEACHER_STEPS):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH)
        method.loss(nets, items.batch(rows), Noise(derive(seed, "teacher"), rows)).value.backward()  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    net.eval().requires_grad_(False)
    return nets.model


def distil(method: Method, teacher: Denoiser, seed: int) -> Denoiser:
    """`STEPS` steps of a method with the roles fake_score and student; the average of the student."""
    nets = {"fake_score": network(teacher.network), "student": network(teacher.network)}  # type: ignore[arg-type]
    optimizers = {
        role: torch.optim.Adam(nets[role].parameters(), lr=lr, betas=(0.0, 0.999), fused=True)
        for role, lr in (("fake_score", 1e-4), ("student", 5e-5))
    }
    seen = SimpleNamespace(teacher=teacher, **{role: Denoiser(net, PATH, "eps") for role, net in nets.items()})
    average = network(nets["student"])
    for step in range(STEPS):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH)
        for index, update in enumerate(method.updates(Clock(step * BATCH, BATCH, STEPS * BATCH))):
            for role, net in nets.items():
                net.requires_grad_(role == update.role)
            for number, loss in enumerate(update.losses):
                noise = Noise(derive(seed, "update", index, number), rows)
                loss(seen, {"x": torch.zeros(BATCH, 2)}, noise).value.backward()  # type: ignore[arg-type]
            torch.nn.utils.clip_grad_value_(nets[update.role].parameters(), 1.0)
            optimizers[update.role].step()
            optimizers[update.role].zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(nets["student"].parameters()), 1 - DECAY)
    return Denoiser(average, PATH, "eps")


def nearest_of(student: Denoiser, method: ScoreForgetting, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(the nearest law, the distance to its mean in deviations) of a sample for each of the labels."""
    noise = Noise(derive(seed, "sample"), torch.arange(len(labels)))
    with torch.no_grad():
        x = method.own_sampler().sample(student, (len(labels), 2), noise, {"label": labels})
    angle = torch.arange(8) * (2 * torch.pi / 8)
    distance, nearest = torch.cdist(x, torch.stack([angle.cos(), angle.sin()], 1)).min(1)
    return nearest, distance / DATA.std


def measured(forget: int, override: int, seed: int) -> dict[str, float]:
    method = ScoreForgetting(forget=forget, override=override, alpha=1.2, lam=0.1, mu=0.1)
    method.check_data(DATA)
    student = distil(method, teacher_of(seed), seed)
    forgotten, far = nearest_of(student, method, torch.full((SAMPLES,), forget), seed)
    labels = torch.arange(SAMPLES) % 7
    labels = labels + (labels >= forget)
    remaining, far_remaining = nearest_of(student, method, labels, seed)
    return {
        "forget": (forgotten == forget).float().mean().item(),
        "override": (forgotten == override).float().mean().item(),
        "remain": (remaining == labels).float().mean().item(),
        "off_manifold": (torch.cat([far, far_remaining]) > 4).float().mean().item(),
    }


@pytest.mark.gate
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(3))
def test_the_ring_forgets_a_law_for_its_neighbour(seed: int, record_property: Callable[[str, float], None]) -> None:
    result = measured(forget=0, override=1, seed=seed)
    for name, value in result.items():
        record_property(name, value)
    assert result["forget"] <= 0.05
    assert result["override"] >= 0.90
    assert result["remain"] >= 0.95
    assert result["off_manifold"] <= 0.12


@pytest.mark.gate
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(3))
def test_the_ring_forgets_a_law_for_one_far_away(seed: int, record_property: Callable[[str, float], None]) -> None:
    """Reported: samples may first leave the law for others than the one asked for (arXiv:2409.11219 asserts nothing of it)."""
    for name, value in measured(forget=0, override=4, seed=seed).items():
        record_property(f"far_{name}", value)
