"""What each optimiser makes of one toy problem in one number of steps: prints a table, for docs/optimizers.md.

    python benchmarks/optimizers.py                    # all of them; about ten minutes of one core
    python benchmarks/optimizers.py --name soap --name adamw

A flow of the checkerboard, learnt by a perceptron, batches of 256. Each optimiser has its own learning rate: the best of a third of its
default, its default and three times that, by seed 0 (those that find their own keep it). Told are the loss, on points and noise that are
the same for all, and the energy distance of samples to fresh data, both of averaged weights, over seeds 0, 1 and 2.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated

import torch
import typer
from torch import Tensor

from gentrain.data.toys import Checkerboard
from gentrain.metrics.distances import energy_distance
from gentrain.models.denoiser import Denoiser
from gentrain.models.mlp import MLP
from gentrain.noise import Noise
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.samplers.heun import Heun
from gentrain.training.optimizers import Averaging, Optimizer

BATCH, SEEDS, HELD_OUT, DRAWN = 256, 3, 16_384, 3_000
SETTINGS = {"fira": {"rank": 32}}  # a quarter of the width, as its paper has it
HALF_LIFE = 0.03  # of the average, as a share of the steps


@dataclass
class Found:
    loss: float
    denoiser: Denoiser
    seconds: float


@cache
def points(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """x0 [count, 2], eps [count, 2] and t [count]; negative seeds are of held-out items."""
    generator, split = torch.Generator().manual_seed(1_000 + seed), "train" if seed >= 0 else "held_out"
    x0 = Checkerboard(seed=abs(seed), held_out=count).split(split).batch(torch.arange(count))["x"]
    return x0, torch.randn(x0.shape, generator=generator), torch.randn(count, generator=generator).sigmoid()


def loss_of(denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    path = denoiser.path
    return (denoiser.velocity(path.perturb(x0, eps, t), t) - path.velocity(x0, eps, t)).square().mean()


def trained(optimizer: Optimizer, seed: int, steps: int) -> Found:
    torch.manual_seed(seed)
    network = MLP().build((2,), 0)
    denoiser = Denoiser(network, RectifiedFlow(), "velocity")
    parameters = list(network.parameters())
    average = [p.detach().clone() for p in parameters]
    built, began = optimizer.build(parameters), time.process_time()
    batches = zip(*(part.split(BATCH) for part in points(seed, steps * BATCH)), strict=True)
    for step, batch in enumerate(batches):
        for group in built.param_groups:  # down at the end, but for those that have no end or find their own
            group["lr"] = optimizer.lr * (1 if optimizer.one_lr else (1 + math.cos(math.pi * step / steps)) / 2)
        built.zero_grad()
        loss_of(denoiser, *batch).backward()
        built.step()
        share = 1 - 0.5 ** (1 / (HALF_LIFE * steps))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], max(share, 1 / (step + 1)))
    seconds = time.process_time() - began
    with torch.no_grad():
        for p, mean in zip(parameters, average, strict=True):
            p.copy_(built.average(p) if isinstance(built, Averaging) else mean)
        return Found(loss_of(denoiser, *points(-1, HELD_OUT)).item(), denoiser, seconds)


@torch.no_grad()
def distance(denoiser: Denoiser, seed: int) -> float:
    drawn = Heun(steps=12).sample(denoiser, (DRAWN, 2), Noise(seed, torch.arange(DRAWN)))
    return energy_distance(drawn, points(-2, DRAWN)[0])


def best_lr(optimizer: Optimizer, steps: int) -> tuple[Optimizer, Found]:
    """By seed 0, and what it found there."""
    times = (1.0,) if optimizer.registered_name in ("dog", "prodigy") else (1 / 3, 1.0, 3.0)
    tried = [replace(optimizer, lr=optimizer.lr * factor) for factor in times]
    found = [trained(each, 0, steps) for each in tried]
    place = min(range(len(tried)), key=lambda i: found[i].loss if math.isfinite(found[i].loss) else math.inf)
    return tried[place], found[place]


def spread(values: list[float], digits: int) -> str:
    return f"{sum(values) / len(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main(
    name: Annotated[list[str] | None, typer.Option(help="an optimiser; may be given more than once; left out: all")] = None,
    steps: Annotated[int, typer.Option(help="of each run")] = 800,
) -> None:
    torch.set_num_threads(1)
    print("| optimiser | lr | loss | energy distance x 1000 | CPU ms a step |\n|---|---|---|---|---|")
    for each, kind in Optimizer.available().items():
        if name and each not in name:
            continue
        chosen, first = best_lr(kind(**SETTINGS.get(each, {})), steps)
        found = [first, *(trained(chosen, seed, steps) for seed in range(1, SEEDS))]
        cells = [spread([f.loss for f in found], 4), spread([1e3 * distance(f.denoiser, seed) for seed, f in enumerate(found)], 2)]
        milliseconds = f"{1e3 * min(f.seconds for f in found) / steps:.2f}"
        print(f"| `{each}` | {chosen.lr:.2g} | {' | '.join(cells)} | {milliseconds} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
