"""Students of every generator loss, of one step and of two, distilled from a teacher of the 2-D mixture of eight classes.

Distances are squared sliced Wasserstein distances of 10,000 samples from as many fresh points.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gentrain.data.toys import Mixture
from gentrain.methods.base import Clock
from gentrain.methods.distribution_matching import DistributionMatching
from gentrain.methods.flow_matching import FlowMatching
from gentrain.metrics.distances import sliced_wasserstein
from gentrain.models.adapters import Base
from gentrain.models.denoiser import Denoiser
from gentrain.models.heads import FeatureCritic, Heads, feature_shapes
from gentrain.models.mlp import MLP
from gentrain.noise import Noise, derive
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.times import LogitNormal, LogNormal
from gentrain.samplers.base import Sampler
from gentrain.samplers.one_step import OneStep

pytestmark = [pytest.mark.gate, pytest.mark.timeout(3600)]

STEPS, BATCH, SAMPLES = 400, 256, 10_000
SEEDS = (0, 1, 2)
Record = Callable[[str, object], None]
STUDENT_RATE, OTHER_RATE = 1e-4, 1e-3
CASES: dict[str, dict[str, Any]] = {
    "vsd": {"generator_loss": "vsd"},
    "dmd": {"generator_loss": "dmd"},
    "dmd2": {"generator_loss": "dmd", "critic_weight": 0.01, "student_every": 2},
    "dmd2, teacher's features": {"generator_loss": "dmd", "critic_weight": 0.01, "student_every": 2, "critic_heads": Heads()},
    "dmd2, fake score's features": {
        "generator_loss": "dmd",
        "critic_weight": 0.01,
        "student_every": 2,
        "critic_heads": Heads(of="fake_score"),
    },
    "ladd": {
        "generator_loss": "ladd",
        "critic_weight": 1.0,
        "critic_heads": Heads(width=256),
        "critic_times": LogNormal(mean=-2.0, std=1.0),
    },
    "dmd, 2 steps, told": {"generator_loss": "dmd", "steps": 2, "fake_score_reads_step": True},
    "sid": {"generator_loss": "sid", "alpha": 1.2},
    **{name: {"generator_loss": name} for name in ("kl", "js", "sf", "neyman", "sh", "jf")},
}


class Group:
    def mean(self, value: Tensor) -> Tensor:
        return value.detach()

    def gather(self, value: Tensor) -> Tensor:
        return value.detach()


def descend(method: Any, nets: SimpleNamespace, seed: int, steps: int, rates: dict[str, float]) -> None:
    """A plain loop: Adam per role, with a learning rate that falls to zero, which serves here as the average of the weights would."""
    items = Mixture(seed=seed).split("train")
    networks = {role: getattr(nets, role).network for role in rates}
    optimizers = {role: torch.optim.Adam(networks[role].parameters(), lr=lr, betas=(0.0, 0.999), fused=True) for role, lr in rates.items()}
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) for optimizer in optimizers.values()]
    for step in range(steps):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH)
        batch = items.batch(rows)
        for number, update in enumerate(method.updates(Clock(step * BATCH, BATCH, steps * BATCH))):
            for role, network in networks.items():
                network.requires_grad_(role == update.role)
            update.losses[0](nets, batch, Noise(derive(seed, "train", number), rows)).value.backward()
            torch.nn.utils.clip_grad_norm_(networks[update.role].parameters(), 1.0)
            optimizers[update.role].step()
            optimizers[update.role].zero_grad()
        for schedule in schedules:
            schedule.step()


@cache
def teacher_of(seed: int) -> Denoiser:
    torch.manual_seed(seed)
    teacher = Denoiser(MLP().build((2,), 8), RectifiedFlow(), "velocity")
    method = FlowMatching(times=LogitNormal(), label_dropout=0.1)
    descend(method, SimpleNamespace(model=teacher, group=Group()), seed, 1000, {"model": 2e-3})
    teacher.network.requires_grad_(False)
    return teacher


def student_of(case: str, seed: int) -> tuple[Denoiser, Sampler]:
    method, teacher = DistributionMatching(**CASES[case]), teacher_of(seed)
    roles = {role: Denoiser(deepcopy(teacher.network), teacher.path, "velocity") for role in method.roles if role != "teacher"}
    if method.fake_score_reads_step:
        roles["fake_score"].network.add_inputs(("step",))
    if method.critic_heads is not None:
        torch.manual_seed(seed)  # of the heads, whatever was made before
        read = teacher.network if method.critic_heads.of == "teacher" else roles["fake_score"].network
        shapes = feature_shapes(read, method.critic_heads, (2,))
        roles["critic"].network = FeatureCritic(Base(read, live=True), method.critic_heads, shapes)
    descend(
        method,
        SimpleNamespace(teacher=teacher, group=Group(), **roles),
        seed,
        STEPS,
        {role: STUDENT_RATE if role == "student" else OTHER_RATE for role in roles},
    )
    return roles["student"], method.own_sampler()


def quality(denoiser: Denoiser, sampler: Sampler, seed: int) -> tuple[float, float]:
    """(squared sliced Wasserstein distance from fresh points, share of the samples that lie nearest to the mean of the asked class)."""
    rows = torch.arange(SAMPLES)
    labels = rows % 8  # of the fresh points too: unequal shares of the classes would drown the differences sought
    fresh = Mixture().draw(labels, Noise(derive(seed, "fresh"), rows))
    with torch.no_grad():
        x = sampler.sample(denoiser, (SAMPLES, 2), Noise(derive(seed, "sample"), rows), {"label": labels})
    angle = torch.arange(8) * (2 * torch.pi / 8)
    nearest = torch.cdist(x, 0.8 * torch.stack([angle.cos(), angle.sin()], 1)).argmin(1)
    return sliced_wasserstein(x, fresh), (nearest == labels).float().mean().item()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
def test_students_of_every_loss(case: str, seed: int, record_property: Record) -> None:
    """The table of docs/methods/distribution_matching.md. Before distillation the teacher's one call is 2.7e-3 to 2.9e-3 away.

    Two steps of dmd whose fake score is not told them are no case: they were worse than before on two seeds of three.
    """
    before, _ = quality(teacher_of(seed), OneStep(), seed)
    distance, right = quality(*student_of(case, seed), seed)
    record_property("squared sliced Wasserstein, before and after", f"{before:.2e}, {distance:.2e}")
    record_property("classes right", round(right, 4))
    limit = {"vsd": 0.8, "ladd": 0.5, "dmd, 2 steps, told": 0.5}.get(case, 1 / 3)
    assert distance < before * limit  # measured: at most .57, .33, .34 and .22
    assert right > 0.99
