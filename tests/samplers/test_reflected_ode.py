import pytest
import torch

from gentrain.domains.ball import Ball
from gentrain.domains.base import Domain
from gentrain.domains.box import Box
from gentrain.domains.simplex import Simplex
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.inside import Inside
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.euler import Euler
from gentrain.samplers.heun import Heun
from gentrain.samplers.reflected_ode import ReflectedODE, bump
from tests.samplers.reflected import ATOMS, WEIGHTS, atoms_denoiser
from tests.samplers.toy import CONDITION

COUNT = 4000


def noise_of(count: int) -> Noise:
    return Noise(1, torch.arange(count))


@pytest.mark.parametrize("sampler", [ReflectedODE(steps=50), ReflectedODE(steps=200, order=1), ReflectedODE(steps=50, walls="bump")])
def test_the_exact_score_gives_the_data(sampler: ReflectedODE) -> None:
    x = sampler.sample(atoms_denoiser(), (COUNT, 1), noise_of(COUNT))
    assert Box().contains(x).all()
    nearest = (x - ATOMS).abs().argmin(1)
    # the bump holds back what starts near a wall
    assert (torch.bincount(nearest, minlength=3) / COUNT - WEIGHTS).abs().max() < 0.03
    assert (x[:, 0] - ATOMS[nearest]).abs().quantile(0.99) < 0.02


def flow_on(domain: Domain, push: float) -> Denoiser:
    """A rectified flow that drives everything outwards."""
    return Denoiser(lambda x, t, condition: -push * (1 + x), RectifiedFlow(space=Inside(domain=domain)), "velocity")


def test_one_heun_step_averages_velocities_seen_from_where_it_began() -> None:
    """x' = fold(x + h v(x)) on (0, 1); the mean of v(x) and of v(x') mirrored back, if an odd number of folds lies between."""
    denoiser, x = flow_on(Box(), 0.9), torch.tensor([[0.1], [0.4], [0.8]])
    first = 0.9 * (1 + x)
    free = x + first / 2  # one step of h = 1/2 in decreasing t
    odd = free.floor().remainder(2) == 1
    there = torch.where(odd, 2 - free, free)
    assert odd.tolist() == [[False], [True], [True]]
    second = torch.where(odd, -0.9 * (1 + there), 0.9 * (1 + there))
    middle = x + (first + second) / 4
    middle = torch.where(middle.floor().remainder(2) == 1, 2 - middle, middle).abs()
    expected = middle + 0.9 * (1 + middle) / 2
    expected = torch.where(expected.floor().remainder(2) == 1, 2 - expected, expected)
    torch.testing.assert_close(ReflectedODE(steps=2).solve(denoiser, x, noise_of(3)), expected)


def test_away_from_the_walls_it_is_euler_and_heun() -> None:
    domain = Box(-1000.0, 1000.0)
    denoiser, x = flow_on(domain, 0.5), torch.linspace(-1, 1, 5)[:, None]
    torch.testing.assert_close(
        ReflectedODE(steps=7, order=1).solve(denoiser, x, noise_of(5)), Euler(steps=7).solve(denoiser, x, noise_of(5))
    )
    torch.testing.assert_close(ReflectedODE(steps=7).solve(denoiser, x, noise_of(5)), Heun(steps=7).solve(denoiser, x, noise_of(5)))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("domain", [Box(), Ball(1.0), Simplex(2)])
def test_strong_guidance_leaves_nothing_outside_and_the_plain_sampler_does(domain: Domain, order: int) -> None:
    def network(x: torch.Tensor, t: torch.Tensor, condition: dict | None) -> torch.Tensor:
        assert condition is not None
        return (condition["label"][:, None] - 1.0) * (0.3 + x.flip(1))

    denoiser = Denoiser(network, RectifiedFlow(space=Inside(domain=domain)), "velocity")
    condition = {"label": CONDITION["label"].repeat(500)}
    sampler = ReflectedODE(steps=10, guidance=10.0, order=order)
    x = sampler.sample(denoiser, (3000, 2), noise_of(3000), condition)
    assert x.dtype == torch.float32 and domain.contains(x).all()
    assert not domain.contains(Euler(steps=10, guidance=10.0).sample(denoiser, (3000, 2), noise_of(3000), condition)).all()


def test_bump_is_one_at_the_centre_and_nothing_at_the_walls() -> None:
    box = Box(-1.0, 1.0)
    u = torch.tensor([[0.5, 0.25, 1e-6, 1 - 1e-6]], dtype=torch.float64)
    values = bump(box, 2 * u - 1)
    expected = ((4 - 1 / (0.25 - (0.5 - u) ** 2)) / 200).exp()
    torch.testing.assert_close(values, expected)
    assert values[0, 0] == 1 and values[0, 2:].max() == 0
    edge = box.interior(torch.tensor([[-1.0, 1.0]]))
    assert bump(box, edge).tolist() == [[0.0, 0.0]]


def test_with_the_bump_what_is_at_a_wall_stays_there() -> None:
    """Without it the first step alone would carry x by 0.1, and a mirror would send it back."""
    x = Box().interior(torch.tensor([[1.0], [0.999999]]))
    moved = ReflectedODE(steps=10, walls="bump").solve(flow_on(Box(), 0.5), x, noise_of(2))
    assert torch.equal(moved, x)
    assert (ReflectedODE(steps=10).solve(flow_on(Box(), 0.5), x, noise_of(2)) < 0.95).all()


def test_what_has_no_walls_or_scales_x_is_refused() -> None:
    x = torch.zeros(3, 1)
    with pytest.raises(ValueError, match="has no walls"):
        ReflectedODE().solve(Denoiser(lambda x, t, c: x, RectifiedFlow(), "velocity"), x, noise_of(3))
    with pytest.raises(ValueError, match="variance_preserving leaves; take reflected_heat or rectified_flow"):
        ReflectedODE().solve(Denoiser(lambda x, t, c: x, VariancePreserving(space=Inside(domain=Box())), "v"), x, noise_of(3))
    with pytest.raises(ValueError, match="set walls: reflect"):
        ReflectedODE(walls="bump").solve(flow_on(Ball(), 1.0), x, noise_of(3))
