import math

import pytest
import torch

from gentrain.config import ConfigError
from gentrain.data.base import Data
from gentrain.domains.ball import Ball
from gentrain.domains.box import Box
from gentrain.domains.simplex import Simplex
from gentrain.noise import Noise
from gentrain.paths.dual import Dual
from gentrain.paths.inside import Inside, StickBreaking
from gentrain.paths.space import Space
from tests.paths.test_dual import Points


def noise_of(count: int) -> Noise:
    return Noise(3, torch.arange(count))


def test_prior_and_data_lie_strictly_inside() -> None:
    x = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.6, 0.4]])
    for domain in (Box(), Ball(), Simplex(2)):
        space = Inside(domain=domain)
        space.fit(Points(x))
        space.check(Points(x))
        assert space.bounds is domain
        assert domain.slack(space.encode(x).double()).min() > 0.9e-6  # on the boundary the kernel has no score
        assert domain.contains(space.prior(noise_of(10_000), (10_000, 2))).all()


def test_stick_breaking_is_a_cube_and_comes_back() -> None:
    domain = Simplex(3)
    x = domain.uniform(noise_of(1000), (1000, 3))
    space = StickBreaking()
    space.fit(Points(x, domain))
    u = space.encode(x)
    assert space.bounds == Box(0.0, 1.0) and Box().contains(u).all()
    torch.testing.assert_close(space.decode(u), x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(u[:, 1], x[:, 1] / (1 - x[:, 0]), rtol=1e-4, atol=1e-6)
    corners = torch.cat([torch.zeros(1, 3), torch.eye(3)])
    assert Box().contains(space.encode(corners)).all()
    torch.testing.assert_close(space.decode(space.encode(corners)), corners, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [Inside, Dual])
def test_data_outside_of_the_set_are_refused_but_for_rounding(kind: type) -> None:
    x = torch.full((1500, 2), 0.5)
    x[3] = torch.tensor([1.0 + 1e-6, 0.0])
    space = kind(domain=Box())
    space.fit(Points(x))
    space.check(Points(x))
    x[:, 1] = torch.linspace(0.5, 1.5, 1500)
    with pytest.raises(ValueError, match=r"of 1000 training samples lie outside of box, the furthest 0\.\d+ away .*; name a domain"):
        space.check(Points(x))


def fitted(space: Space, data: Data) -> None:
    space.fit(data)
    space.check(data)


@pytest.mark.parametrize("kind", [Inside, Dual])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_data_that_are_no_numbers_are_told(kind: type, value: float) -> None:
    x = torch.full((50, 2), 0.5)
    x[3, 1] = value
    with pytest.raises(ConfigError, match="data: 1 of 50 training samples hold NaN or infinity; leave them out"):
        fitted(kind(domain=Box()), Points(x))


def test_no_data_are_told() -> None:
    with pytest.raises(ConfigError, match="data: points has no training samples"):
        fitted(Inside(domain=Box()), Points(torch.zeros(0, 2)))


@pytest.mark.parametrize("digits", [None, 4])
@pytest.mark.parametrize("kind", [Inside, StickBreaking, Dual])
def test_proportions_that_hold_the_last_one_are_refused(kind: type, digits: int | None) -> None:
    parts = Simplex(3).parts(Simplex(3).uniform(noise_of(300), (300, 3)))
    written = parts if digits is None else (parts * 10**digits).round() / 10**digits
    with pytest.raises(ValueError, match=r"the 4 proportions of each of 300 training samples add up to 1.*; leave one of them out"):
        fitted(kind(domain=Simplex(4)), Points(written))
    parts[::2] *= 1 - 1e-4  # a fifth one that is rare is no mistake
    fitted(kind(domain=Simplex(4)), Points(parts))


def test_stick_breaking_of_another_set_is_refused() -> None:
    with pytest.raises(ValueError, match="for the simplex, not for ball"):
        StickBreaking(domain=Ball()).fit(Points(torch.zeros(2, 2)))
