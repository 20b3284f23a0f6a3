"""Whether samples look like data, and whether all data are reached, by nearest neighbours in a space of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gentrain.metrics.base import Metric, bootstrap_interval, proportion


@dataclass(frozen=True)
class Neighbourhoods:
    """What of two samples lies in whose neighbourhoods: balls around each point up to its k-th nearest of its own sample.

    Attributes:
        realistic: [N] bool, generated samples in the ball of some real one; their share is the precision.
        reached: [M] bool, real samples in the ball of some generated one; their share is the recall.
        covered: [M] bool, real samples with a generated one in their ball; their share is the coverage.
        balls: [N] int64, how many real balls each generated sample lies in; their mean / k is the density, 1 where the laws are equal.
    """

    realistic: Tensor
    reached: Tensor
    covered: Tensor
    balls: Tensor
    k: int

    @property
    def density(self) -> float:
        return float(self.balls.double().mean()) / self.k


def neighbourhoods(generated: Tensor, real: Tensor, k: int = 5) -> Neighbourhoods:
    """Of features [N, D] and [M, D] (arXiv:1904.06991, eq. 1 and 2; arXiv:2002.09797, eq. 4 and 5). Balls are closed.

    Precision and recall trust every ball, an outlier's too; density and coverage take balls around real samples only. All depend on N, M
    and k: compare at equal ones.

    Raises ValueError: k is not below N and M.
    """
    if not 1 <= k < min(len(generated), len(real)):
        raise ValueError(f"k must be from 1 to below the number of samples, {len(generated)} and {len(real)}, got {k}")
    generated, real = generated.double(), real.double()
    around_generated, around_real = _radii(generated, k), _radii(real, k)
    realistic = torch.zeros(len(generated), dtype=torch.bool)
    reached, covered = (torch.zeros(len(real), dtype=torch.bool) for _ in range(2))
    balls = torch.zeros(len(generated), dtype=torch.int64)
    for place, part in _parts(generated):
        distances = torch.cdist(part, real)
        in_real = distances <= around_real
        balls[place] = in_real.sum(1)
        realistic[place] = in_real.any(1)
        covered |= in_real.any(0)
        reached |= (distances <= around_generated[place, None]).any(0)
    return Neighbourhoods(realistic, reached, covered, balls, k)


def neighbour_metrics(generated: Tensor, real: Tensor, name: str, of: str, k: int = 5) -> list[Metric]:
    """Precision, recall, density and coverage. Their intervals are of the number given the balls, not of the choice of the balls' samples.

    Args:
        name: of the generated sample, in the metrics' names.
        of: what the rows are, in their definitions.
    """
    found = neighbourhoods(generated, real, k)
    sizes = f"{of}, {len(generated)} against {len(real)} samples, balls up to the {k}th neighbour"
    density = bootstrap_interval(lambda balls: float(balls.double().mean()) / k, found.balls)
    shares = [
        ("precision", found.realistic, "generated samples within a ball of a real one"),
        ("recall", found.reached, "real samples within a ball of a generated one"),
        ("coverage", found.covered, "real samples with a generated one in their ball"),
    ]
    metrics = [proportion(f"{what}, {name}", hits, "higher", f"{told}: {sizes}; Wilson interval") for what, hits, told in shares]
    told = f"real balls around a generated sample / {k}, 1 for equal laws: {sizes}; bootstrap interval"
    return [*metrics, Metric(f"density, {name}", found.density, density.low, density.high, "higher", told)]


def _parts(x: Tensor) -> list[tuple[slice, Tensor]]:
    """In portions, since all pairs of 50,000 samples would take 20 GB."""
    return [(slice(start, start + 1024), x[start : start + 1024]) for start in range(0, len(x), 1024)]


def _radii(x: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest other row [N]."""
    # itself is the nearest of all; a matrix product would round its distance away from 0
    nearest = [torch.cdist(part, x, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(k + 1, dim=1).values for _, part in _parts(x)]
    return torch.cat(nearest)
