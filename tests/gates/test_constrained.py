"""Generation inside convex sets: quality on toys whose law is known, and not one sample outside.

Distances between samples are Wasserstein-1, averaged over 64 directions, of 5,000 samples from as many fresh points; two fresh sets of the
mixture in the square are 0.0047 to 0.0090 apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from scipy.stats import beta, kstest
from torch import Tensor

from gentrain.data.base import Data, TensorItems
from gentrain.domains.ball import Ball
from gentrain.domains.base import Domain
from gentrain.domains.box import Box
from gentrain.domains.orthonormal_slabs import OrthonormalSlabs
from gentrain.domains.polytope import Polytope
from gentrain.domains.simplex import Simplex
from gentrain.methods.base import Clock, Method
from gentrain.methods.diffusion import Diffusion
from gentrain.methods.flow_matching import FlowMatching
from gentrain.methods.mirror_flow import MirrorFlow
from gentrain.methods.reflected_diffusion import ReflectedDiffusion
from gentrain.methods.reflected_flow import ReflectedFlow
from gentrain.models.denoiser import Denoiser
from gentrain.models.mlp import MLP
from gentrain.noise import Noise, derive
from gentrain.paths.base import Path
from gentrain.paths.dual import Dual
from gentrain.paths.inside import Inside, StickBreaking
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.reflected_heat import ReflectedHeat
from gentrain.paths.times import Uniform
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.base import Sampler
from gentrain.samplers.confined import Confined
from gentrain.samplers.ddim import DDIM
from gentrain.samplers.euler import Euler
from gentrain.samplers.reflected_ode import ReflectedODE
from gentrain.samplers.reflected_sde import ReflectedSDE

pytestmark = [pytest.mark.gate, pytest.mark.timeout(3600)]

SEEDS = (0, 1, 2)
STEPS, BATCH, POOL, COUNT = 2000, 256, 2**16, 5000
NORMAL = math.inf  # degrees of freedom
Record = Callable[[str, object], None]
Case = tuple[Method, Path, str, Sampler]


class Points(Data):
    """Points of a law, with the domain they lie in; two classes, below and above the median of the first coordinate."""

    registered_name = "points"

    def __init__(self, domain: Domain, dim: int, draw: Callable[[Noise, int], Tensor]):
        self.set, self.dim, self._draw = domain, dim, draw

    @property
    def domain(self) -> Domain:
        return self.set

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.dim,)

    def points(self, purpose: str, seed: int, count: int) -> Tensor:
        return self._draw(Noise(derive(seed, "points", purpose), torch.arange(count)), count)

    def split(self, name: str) -> TensorItems:
        x = self.points(name, 0, 10_000)
        return TensorItems(x, torch.zeros(len(x), dtype=torch.int64))


class Nets:
    def __init__(self, model: Denoiser):
        self.model = model


def train(case: Case, data: Points, seed: int, steps: int = STEPS, classes: int = 0) -> Denoiser:
    """A plain loop: Adam with a learning rate that falls to zero, which serves here as the average of the weights would."""
    method, path, prediction, _ = case
    path.space.fit(data)
    method.check(path)
    torch.manual_seed(seed)
    x = data.points("train", seed, POOL)
    label = (x[:, 0] > x[:, 0].median()).long()
    network = MLP().build(data.shape, classes)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    nets = Nets(Denoiser(network, path, prediction))
    for step in range(steps):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH)
        batch = {"x": x[rows % POOL]} | ({"label": label[rows % POOL]} if classes else {})
        (update,) = method.updates(Clock(step * BATCH, BATCH, steps * BATCH))
        update.losses[0](nets, batch, Noise(derive(seed, "noise"), rows)).value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return nets.model


def draw(denoiser: Denoiser, sampler: Sampler, count: int, dim: int, seed: int, classes: int = 0) -> Tensor:
    parts = []
    for rows in torch.arange(count).split(10_000):
        condition = {"label": rows % classes} if classes else None
        with torch.no_grad():
            parts.append(sampler.sample(denoiser, (len(rows), dim), Noise(derive(seed, "sample"), rows), condition))
    return torch.cat(parts)


def sliced_w1(a: Tensor, b: Tensor) -> float:
    import ot

    return float(ot.sliced_wasserstein_distance(a.double().numpy(), b.double().numpy(), n_projections=64, seed=0, p=1))


def mirror(kappa: float = 0.1, nu: float | None = None, **domain: Any) -> Case:
    """On the unit square."""
    return MirrorFlow(), RectifiedFlow(space=Dual(domain=Box(kappa=kappa, **domain), nu=nu)), "velocity", Euler(steps=100)


def reflected_flow() -> Case:
    return ReflectedFlow(), RectifiedFlow(space=Inside()), "velocity", ReflectedODE(steps=50)


def reflected_diffusion(space: Inside, sampler: Sampler) -> Case:
    return ReflectedDiffusion(), ReflectedHeat(space=space, sigma_min=0.005, sigma_max=5.0), "eps", sampler


def unconstrained(sampler: Sampler) -> Case:
    return FlowMatching(times=Uniform()), RectifiedFlow(), "velocity", sampler


# --- a mixture in the unit square, cut off by its walls ---------------------------------------------------------------------

MEANS, STDS = torch.tensor([[0.1, 0.15], [0.85, 0.3], [0.5, 0.95]]), torch.tensor([0.1, 0.15, 0.12])


def _square(noise: Noise, count: int) -> Tensor:
    """Three normal laws near the walls, truncated by rejection, with probabilities 0.4, 0.35, 0.25."""
    x = torch.full((count, 2), -1.0)
    while not bool((inside := Box().contains(x)).all()):
        component = torch.bucketize(noise.uniform((count,)), torch.tensor([0.4, 0.75]))
        x = torch.where(inside[:, None], x, MEANS[component] + STDS[component, None] * noise.normal((count, 2)))
    return x


SQUARE = Points(Box(), 2, _square)
CASES: dict[str, tuple[Case, float]] = {  # case, limit of the distance
    "reflected_diffusion": (reflected_diffusion(Inside(), ReflectedSDE(steps=100)), 0.020),
    "reflected_flow": (reflected_flow(), 0.020),
    "mirror_flow-0.1": (mirror(0.1), 0.025),
    "mirror_flow-0.3": (mirror(0.3), 0.035),
    "mirror_flow-0.3-normal": (mirror(0.3, NORMAL), math.inf),
    "mirror_diffusion": (
        (Diffusion(), VariancePreserving(schedule="cosine", space=Dual(domain=Box(kappa=0.1), nu=NORMAL)), "v", DDIM(steps=100)),
        0.025,
    ),
    "unconstrained": (unconstrained(Euler(steps=100)), math.inf),
}


@cache
def trained(name: str, seed: int) -> Denoiser:
    return train(CASES[name][0], SQUARE, seed)


@cache
def drawn(name: str, seed: int) -> Tensor:
    return draw(trained(name, seed), CASES[name][0][3], COUNT, 2, seed)


def distance(x: Tensor, seed: int) -> float:
    return sliced_w1(x, SQUARE.points("fresh", seed, len(x)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [name for name, (_, limit) in CASES.items() if limit < math.inf])
def test_the_mixture_in_the_square(name: str, seed: int, record_property: Record) -> None:
    found = distance(drawn(name, seed), seed)
    record_property("sliced W1", round(found, 4))
    assert Box().contains(drawn(name, seed)).all()
    assert found < CASES[name][1]


def test_the_student_t_prior_is_no_worse_than_the_normal_one_on_average(record_property: Record) -> None:
    t, normal = (
        sum(distance(drawn(name, seed), seed) for seed in SEEDS) / len(SEEDS) for name in ("mirror_flow-0.3", "mirror_flow-0.3-normal")
    )
    record_property("student t", round(t, 4))
    record_property("normal", round(normal, 4))
    assert t <= normal


@pytest.mark.parametrize("seed", SEEDS)
def test_other_ways_to_stay_in_the_square(seed: int, record_property: Record) -> None:
    """The other samplers of the reflected model, and what is done with a model that knows no walls, which does leave."""
    for name, sampler in {
        "corrector": ReflectedSDE(steps=100, corrector_steps=1, snr=0.2),
        "ode": ReflectedODE(steps=100),
        "bump": ReflectedODE(steps=100, walls="bump"),
    }.items():
        x = draw(trained("reflected_diffusion", seed), sampler, COUNT, 2, seed)
        record_property(f"reflected_diffusion, {name}", round(distance(x, seed), 4))
        assert Box().contains(x).all()
        assert distance(x, seed) < 0.025
    x = drawn("unconstrained", seed)
    record_property("unconstrained", round(distance(x, seed), 4))
    outside = int((~Box().contains(x)).sum())
    record_property("unconstrained, outside", outside)
    assert outside > 0
    for by in ("projection", "thresholding", "rejection"):
        x = draw(trained("unconstrained", seed), Confined(domain=Box(), by=by, steps=100), COUNT, 2, seed)
        record_property(f"unconstrained, {by}", round(distance(x, seed), 4))
        record_property(f"unconstrained, {by}, within 1e-3 of a wall", round(_at_walls(x), 4))
        assert Box().contains(x).all()
    record_property("fresh points, within 1e-3 of a wall", round(_at_walls(SQUARE.points("fresh", seed, COUNT)), 4))


def _at_walls(x: Tensor) -> float:
    return ((x < 1e-3) | (x > 1 - 1e-3)).any(1).double().mean().item()


# --- the simplex ------------------------------------------------------------------------------------------------------------

ALPHA = (2.0, 3.0, 4.0)


def _dirichlet(noise: Noise, count: int) -> Tensor:
    """Sums of 2, 3 and 4 exponential numbers, normalised."""
    gamma = torch.stack([-(1 - noise.uniform((count, int(a))).double()).log().sum(1) for a in ALPHA], 1)
    return Simplex(2).interior((gamma / gamma.sum(1, keepdim=True))[:, :2].float(), 1e-7)


DIRICHLET = Points(Simplex(2), 2, _dirichlet)
SIMPLEX_CASES: dict[str, Case] = {
    "mirror_flow": (MirrorFlow(), RectifiedFlow(space=Dual()), "velocity", Euler(steps=100)),
    "mirror_flow-entropic": (MirrorFlow(), RectifiedFlow(space=Dual(domain=Simplex(2, "entropic"))), "velocity", Euler(steps=100)),
    "reflected_flow": reflected_flow(),
    "reflected_diffusion": reflected_diffusion(StickBreaking(), ReflectedSDE(steps=200)),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SIMPLEX_CASES)
def test_dirichlet_marginals(name: str, seed: int, record_property: Record) -> None:
    """Of exact points, 10,000 at a time, the largest distance is 0.008 to 0.018. The reflected flow learns proportions as they are, numbers
    near a third, and is slower for it: after 2000 steps one seed of three was above the limit, at 0.031.
    """
    case = SIMPLEX_CASES[name]
    x = draw(train(case, DIRICHLET, seed, 4000 if name == "reflected_flow" else STEPS), case[3], 10_000, 2, seed)
    assert DIRICHLET.set.contains(x).all()
    parts = DIRICHLET.set.parts(x.double())
    worst = max(kstest(parts[:, i].numpy(), beta(a, sum(ALPHA) - a).cdf).statistic for i, a in enumerate(ALPHA))
    record_property("KS", round(float(worst), 4))
    assert worst < 0.03


# --- not one outside --------------------------------------------------------------------------------------------------------


def polytope_of_thirty_facets(kappa: float = 0.1) -> Polytope:
    """30 facets at distance 3 from the centre of 10 dimensions, with random normals."""
    A = torch.randn(30, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Polytope(A / A.norm(dim=1, keepdim=True), torch.full((30,), 3.0, dtype=torch.float64), kappa=kappa, walk=60)


def _slabs() -> OrthonormalSlabs:
    return OrthonormalSlabs(
        torch.linalg.qr(torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q.T, -0.9, 0.9
    )


def uniform(domain: Domain, dim: int) -> Points:
    """Half of which lies near the boundary."""
    return Points(domain, dim, lambda noise, count: domain.interior(1.5 * domain.uniform(noise, (count, dim)), 1e-4))


SETS = {
    "box": uniform(Box(-1.0, 1.0), 3),
    "ball": uniform(Ball(2.0), 6),
    "simplex": uniform(Simplex(4), 4),
    "polytope": uniform(polytope_of_thirty_facets(), 10),
    "orthonormal_slabs": uniform(_slabs(), 12),
}
STRONG: dict[str, Callable[[], Case]] = {
    "mirror_flow": lambda: (MirrorFlow(), RectifiedFlow(space=Dual()), "velocity", Euler(steps=10, guidance=10)),
    "reflected_flow": lambda: (ReflectedFlow(), RectifiedFlow(space=Inside()), "velocity", ReflectedODE(steps=10, guidance=10)),
    "reflected_diffusion": lambda: (
        ReflectedDiffusion(),
        ReflectedHeat(space=Inside(), sigma_max=10.0),
        "eps",
        ReflectedSDE(steps=10, guidance=10),
    ),
    "stick_breaking": lambda: reflected_diffusion(StickBreaking(), ReflectedSDE(steps=10, guidance=10)),
}


@pytest.mark.parametrize(
    "name, method",
    [
        *((name, method) for name in SETS for method in ("mirror_flow", "reflected_flow")),
        ("box", "reflected_diffusion"),
        ("simplex", "stick_breaking"),
    ],
)
def test_of_1e5_strongly_guided_samples_none_is_outside(name: str, method: str, record_property: Record) -> None:
    """float32, strict inequalities, guidance weight 10, networks of 200 steps."""
    data, case = SETS[name], STRONG[method]()
    x = draw(train(case, data, 0, steps=200, classes=2), case[3], 100_000, data.dim, 0, classes=2)
    assert x.dtype == torch.float32
    outside = int((~data.set.contains(x)).sum())
    record_property("outside", outside)
    assert outside == 0


@pytest.mark.parametrize("name", SETS)
def test_of_an_unconstrained_flow_many_are(name: str, record_property: Record) -> None:
    data, case = SETS[name], unconstrained(Euler(steps=10, guidance=10))
    x = draw(train(case, data, 0, steps=200, classes=2), case[3], 10_000, data.dim, 0, classes=2)
    share = (~data.set.contains(x)).double().mean().item()
    record_property("share outside", round(share, 4))
    assert share > 0.05
