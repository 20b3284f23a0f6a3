"""Time of one training step of each few-step method, against the passes through the network that it cannot do without.

    python benchmarks/few_step.py                # about two minutes on one idle core

A method's limit is the sum of its passes timed alone, on the same network, data and conditions: F is a forward without gradient, B a
forward with gradient and its backward. consistency_distillation: B + F (teacher) + F (target); with guidance the teacher's F is of twice
the rows. A forward derivative is counted as two F (value and tangent). Steps and passes alternate within a round; printed are the medians
of processor time over the rounds and of the rounds' ratios, and their extremes. The optimiser is left out on both sides.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from gentrain.methods.base import Clock, Frozen, Method, Update
from gentrain.methods.consistency_distillation import ConsistencyDistillation
from gentrain.methods.consistency_training import ConsistencyTraining
from gentrain.methods.continuous_consistency import ContinuousConsistency
from gentrain.methods.easy_consistency_tuning import EasyConsistencyTuning
from gentrain.methods.latent_consistency import LatentConsistency
from gentrain.methods.mean_flow import MeanFlow
from gentrain.models.denoiser import Denoiser
from gentrain.models.unet import UNet
from gentrain.noise import Noise
from gentrain.paths.rectified_flow import RectifiedFlow

SHAPE, CLASSES = (1, 28, 28), 10
# method, its limit in (B of the batch, F of the batch)
CASES: dict[str, tuple[Method, int, int]] = {
    "consistency_distillation": (ConsistencyDistillation(), 1, 2),
    "consistency_distillation, guided": (ConsistencyDistillation(guidance=2), 1, 3),
    "latent_consistency": (LatentConsistency(), 1, 3),
    "latent_consistency, dpmpp_2s": (LatentConsistency(solver="dpmpp_2s"), 1, 5),
    "consistency_training": (ConsistencyTraining(), 1, 1),
    "easy_consistency_tuning": (EasyConsistencyTuning(), 1, 1),
    "mean_flow, jvp": (MeanFlow(), 1, 2),
    "mean_flow, difference": (MeanFlow(derivative="difference"), 1, 2),
    "continuous_consistency, jvp": (ContinuousConsistency(), 1, 3),
    "continuous_consistency, difference": (ContinuousConsistency(derivative="difference"), 1, 3),
}


def networks(method: Method) -> dict[str, nn.Module]:
    modules = {}
    for name, role in method.roles.items():
        network = (role.model or UNet(space_to_depth=2)).build(SHAPE, CLASSES)
        if role.inputs:
            network.add_inputs(role.inputs)
        modules[name] = network.requires_grad_(not isinstance(role, Frozen))
    return modules


def step_of(method: Method, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """All losses of one step and their backwards."""
    modules = networks(method)
    nets = SimpleNamespace(
        **{name: Denoiser(m, RectifiedFlow(), "velocity") if method.roles[name].denoiser else m for name, m in modules.items()}
    )
    rows = torch.arange(len(batch["x"]))

    def step() -> None:
        for update in method.updates(Clock(0, len(rows), 100 * len(rows))):
            if isinstance(update, Update):
                for name, module in modules.items():
                    module.requires_grad_(name == update.role)
                for loss in update.losses:
                    loss(nets, batch, Noise(0, rows)).value.backward()
                modules[update.role].zero_grad()

    return step


def passes(batch: dict[str, torch.Tensor]) -> tuple[Callable[[], None], Callable[[], None]]:
    """(forward with gradient and backward, forward without)."""
    network, t, condition = UNet(space_to_depth=2).build(SHAPE, CLASSES), torch.full((len(batch["x"]),), 500.0), {"label": batch["label"]}

    def both() -> None:
        network(batch["x"], t, condition).square().mean().backward()
        network.zero_grad()

    @torch.no_grad()
    def forward() -> None:
        network(batch["x"], t, condition)

    return both, forward


def seconds(function: Callable[[], Any]) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin


def main(
    rounds: Annotated[int, typer.Option(help="rounds whose median is printed")] = 7,
    batch_size: Annotated[int, typer.Option(help="images in a batch")] = 32,
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = {"x": torch.randn(batch_size, *SHAPE), "label": torch.arange(batch_size) % CLASSES}
    both, forward = passes(batch)
    table = Table("method", "passes", "step, ms", "their sum, ms", "ratio (least to largest)")
    for name, (method, with_gradient, without) in CASES.items():
        step = step_of(method, batch)
        times = []
        for _ in range(rounds + 1):
            own = seconds(step)
            times.append((own, with_gradient * seconds(both) + without * seconds(forward)))
        times = times[1:]  # the first round fills caches
        ratios = [own / limit for own, limit in times]
        own, limit = (1e3 * statistics.median(column) for column in zip(*times))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(name, f"B + {without} F", f"{own:.0f}", f"{limit:.0f}", spread)
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
