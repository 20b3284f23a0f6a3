"""The reflected kernel's score and the inverse mirror maps against straightforward implementations, per million elements.

    python benchmarks/constrained.py            # less than a minute on one core

The kernel's rivals are the sum over 42 mirror images that one writes down first, in float32, and the same pair of series that the method's
published code uses (42 images up to sigma = 0.1414, 20 eigenfunctions above). Both are timed on the same x, x0 and sigma, sigma log-uniform
from 0.01 to 5, one per row; errors are the largest and the share of elements off by more than 1e-4, in units of 1 / sigma, against float64.
The inverses' rival is bisection in the logarithm of the slack, to the same x: printed is how far the two lie apart. Times are medians over
the rounds, within which the two alternate; beside the median ratio stand the rounds' extremes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import logsigmoid

from gentrain.domains import heat_kernel
from gentrain.domains.ball import Ball
from gentrain.domains.box import Box
from gentrain.domains.simplex import Simplex

ROWS, COLUMNS = 256, 3_072  # images of 3 x 32 x 32


def by_images(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """42 images at once: mirror images of the start at 2 k +- x0, k from -10 to 10."""
    k = 2 * torch.arange(-10, 11, dtype=x.dtype).reshape(-1, *[1] * x.ndim)
    distance = torch.cat([x - x0 - k, x + x0 - k])
    weight = (-distance.square() / (2 * sigma**2)).exp()
    return -(distance * weight).sum(0) / sigma**2 / (weight.sum(0) + 1e-12)


def by_both_series(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Each row by the series that is meant for its sigma."""
    result, low = torch.empty_like(x), sigma[:, 0] <= 0.02**0.5
    result[low] = by_images(x[low], x0[low], sigma[low])
    x, x0, sigma = x[~low], x0[~low], sigma[~low]
    n = torch.arange(1, 21, dtype=x.dtype).reshape(-1, 1, 1)
    amplitude = (-((n * math.pi * sigma) ** 2) / 2).exp() * (n * math.pi * x0).cos()
    density = 1 + 2 * (amplitude * (n * math.pi * x).cos()).sum(0)
    result[~low] = -2 * math.pi * (n * amplitude * (n * math.pi * x).sin()).sum(0) / (density + 1e-12)
    return result


def bisect(value: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, steps: int) -> Tensor:
    """The root of an increasing function, to (high - low) / 2^steps."""
    for _ in range(steps):
        middle = (low + high) / 2
        below = value(middle) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def box_by_bisection(z: Tensor, kappa: float = 0.1) -> Tensor:
    def value(v: Tensor) -> Tensor:
        return v.sigmoid() + (-kappa * logsigmoid(-v)).exp() - (-kappa * logsigmoid(v)).exp() - z

    return bisect(value, torch.full_like(z, -200), torch.full_like(z, 200), 56).sigmoid()


def ball_by_bisection(z: Tensor, kappa: float = 0.1) -> Tensor:
    norm = z.norm(dim=1)
    minus_log_slack = bisect(
        lambda u: (1 - (-u).exp()).clamp(min=0).sqrt() * (1 + 2 * (kappa * u).exp()) - norm, torch.zeros_like(norm), 200 + 0 * norm, 56
    )
    return z * ((1 - (-minus_log_slack).exp()).sqrt() / norm)[:, None]


def simplex_by_bisection(z: Tensor, kappa: float = 0.1) -> Tensor:
    """For a given last part each other one is a root; the last part is the root of what their sum is off."""

    def parts(log_last: Tensor) -> Tensor:
        goal = z - (-kappa * log_last)[:, None].exp()
        return bisect(lambda y: y.exp() - (-kappa * y).exp() - goal, torch.full_like(z, -200), torch.zeros_like(z), 55).exp()

    last = bisect(lambda y: parts(y).sum(1) + y.exp() - 1, torch.full_like(z[:, 0], -200), torch.zeros_like(z[:, 0]), 55)
    return parts(last)


def race(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> tuple[float, float, float, float, float]:
    """Median seconds of either; median, least and largest of the rounds' ratios theirs / ours."""
    times = []
    for _ in range(rounds + 1):
        marks = [time.perf_counter()]
        for function in (ours, theirs):
            function()
            marks.append(time.perf_counter())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    times = times[1:]  # the first round fills caches
    ratios = [b / a for a, b in times]
    own, other = (statistics.median(column) for column in zip(*times))
    return own, other, statistics.median(ratios), min(ratios), max(ratios)


def errors(score: Tensor, exact: Tensor, sigma: Tensor) -> str:
    off = ((score.double() - exact) * sigma).abs()
    return f"{float(off.max()):.1e}, {float((off > 1e-4).double().mean()):.1e}"


def main(rounds: Annotated[int, typer.Option(help="rounds whose median is printed")] = 7) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    table = Table("what", "rival", "ours, s per million", "rival's", "ratio (least to largest)", "our error", "rival's error")

    def row(what: str, rival: str, million: float, ours: Callable[[], Any], theirs: Callable[[], Any], own: str, other: str) -> None:
        a, b, ratio, low, high = race(ours, theirs, rounds)
        table.add_row(what, rival, f"{a / million:.3f}", f"{b / million:.3f}", f"{ratio:.1f} ({low:.1f} to {high:.1f})", own, other)

    sigma = 0.01 * 500 ** torch.rand(ROWS, 1, generator=generator)
    x0 = torch.rand(ROWS, COLUMNS, generator=generator)
    for law, x in (
        ("folded steps", Box().reflect(x0 + sigma * torch.randn(ROWS, COLUMNS, generator=generator))),
        ("uniform x", torch.rand(ROWS, COLUMNS, generator=generator)),
    ):
        exact = heat_kernel.score(x.double(), x0.double(), sigma.double())
        for rival, function in (("42 images", by_images), ("42 images or 20 eigenfunctions", by_both_series)):
            scores = (lambda x=x: heat_kernel.score(x, x0, sigma), lambda x=x, f=function: f(x, x0, sigma))
            own, other = (errors(score(), exact, sigma) for score in scores)
            row(f"kernel score, {law}", rival, x.numel() / 1e6, *scores, own, other)

    z = 3 * torch.randn(400_000, generator=generator, dtype=torch.float64)
    for what, domain, function, dual in (
        ("box", Box(), box_by_bisection, z.reshape(-1, 8)),
        ("ball", Ball(), ball_by_bisection, z.reshape(-1, 8)),
        ("simplex", Simplex(5), simplex_by_bisection, z[:20_000].reshape(-1, 5)),
    ):
        inverses = (lambda d=domain, z=dual: d.to_primal(z)[0], lambda f=function, z=dual: f(z))
        apart = f"{float((inverses[0]() - inverses[1]()).abs().max()):.1e} apart"
        row(f"inverse mirror map, {what}", "bisection", dual.numel() / 1e6, *inverses, apart, "")
    Console(width=180).print(table)


if __name__ == "__main__":
    typer.run(main)
