"""The mirror flow paper's sets: mixtures in a polytope of 10 dimensions and a ball of 6 (arXiv:2510.08929, section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gentrain.domains.ball import Ball
from gentrain.domains.base import Domain
from gentrain.methods.mirror_flow import MirrorFlow
from gentrain.noise import Noise
from gentrain.paths.dual import Dual
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.samplers.euler import Euler
from tests.gates.test_constrained import (
    COUNT,
    NORMAL,
    SEEDS,
    Case,
    Points,
    Record,
    draw,
    polytope_of_thirty_facets,
    reflected_flow,
    train,
    unconstrained,
)

pytestmark = [pytest.mark.gate, pytest.mark.timeout(3600)]


def _mixture_in(domain: Domain, means: Tensor) -> Callable[[Noise, int], Tensor]:
    """Equal normal laws of covariance 0.4, truncated to the domain."""

    def points(noise: Noise, count: int) -> Tensor:
        x = torch.full((count, means.shape[1]), torch.nan)
        while not bool((inside := domain.contains(x)).all()):
            which = noise.randint(0, len(means), (count,))
            x = torch.where(inside[:, None], x, means[which] + 0.4**0.5 * noise.normal((count, means.shape[1])))
        return x

    return points


def _paper_sets() -> dict[str, Points]:
    polytope, ball = polytope_of_thirty_facets(kappa=0.3), Ball(5.0, kappa=0.3)
    generator = torch.Generator().manual_seed(2)
    far = polytope.interior(6 * torch.nn.functional.normalize(torch.randn(4, 10, generator=generator), dim=1), 0.5)
    out = 4.5 * torch.nn.functional.normalize(torch.randn(4, 6, generator=generator), dim=1)
    return {"polytope": Points(polytope, 10, _mixture_in(polytope, far)), "ball": Points(ball, 6, _mixture_in(ball, out))}


def _mirror(nu: float | None) -> Case:
    return MirrorFlow(), RectifiedFlow(space=Dual(nu=nu)), "velocity", Euler(steps=100)


PAPER_SETS = _paper_sets()
PAPER_CASES: dict[str, Callable[[], Case]] = {
    "mirror, t, nu = beta / kappa": lambda: _mirror(None),
    "mirror, t, the paper's nu = 10": lambda: _mirror(10.0),
    "mirror, normal": lambda: _mirror(NORMAL),
    "reflected flow": reflected_flow,
    "unconstrained": lambda: unconstrained(Euler(steps=100)),
}


def mmd(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy, unbiased, of a normal kernel as wide as the median distance within y."""
    x, y = x.double(), y.double()
    width = torch.pdist(y[:2000]).median()

    def mean(a: Tensor, b: Tensor, same: bool) -> float:
        kernel = (-(torch.cdist(a, b) / width).square() / 2).exp()
        return float((kernel.sum() - (len(a) if same else 0)) / (len(a) * (len(b) - same)))

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def nearest_neighbour_kl(x: Tensor, y: Tensor, k: int = 5) -> float:
    """KL(law of y || law of x) from distances to the k-th neighbours (Perez-Cruz 2008)."""
    x, y = x.double(), y.double()
    own = torch.cdist(y, y).kthvalue(k + 1).values
    other = torch.cdist(y, x).kthvalue(k).values
    return float(y.shape[1] * (other / own).log().mean()) + math.log(len(x) / (len(y) - 1))


@pytest.mark.parametrize("name", PAPER_SETS)
@pytest.mark.parametrize("method", PAPER_CASES)
def test_the_papers_sets(name: str, method: str, record_property: Record) -> None:
    """A table, not a race: the paper's own polytope and mixtures are not published. What must hold is the feasibility."""
    data = PAPER_SETS[name]
    for seed in SEEDS:
        case = PAPER_CASES[method]()
        x = draw(train(case, data, seed), case[3], COUNT, data.dim, seed)
        fresh = data.points("fresh", seed, COUNT)
        feasible = data.set.contains(x).double().mean().item()
        row = (f"{1e3 * mmd(x, fresh):.3f}", f"{nearest_neighbour_kl(x, fresh):.3f}", f"{100 * feasible:.2f}")
        record_property(f"seed {seed}: MMD^2 x 1e3, KL, % feasible", row)
        assert (feasible == 1) == (method != "unconstrained")
