"""Coordinates in a mirror image, and their Student-t prior."""

import logging
import math
from dataclasses import dataclass

import pytest
import torch
from scipy.stats import f as snedecor
from scipy.stats import kstest

from gentrain.config import ConfigError, Document, build
from gentrain.data.base import Data, TensorItems
from gentrain.data.toys import Checkerboard
from gentrain.domains.ball import Ball
from gentrain.domains.base import Domain
from gentrain.domains.box import Box
from gentrain.domains.simplex import Simplex
from gentrain.noise import Noise
from gentrain.paths.base import Path
from gentrain.paths.dual import Dual, heaviest_moment, student_t


def noise_of(count: int) -> Noise:
    return Noise(3, torch.arange(count))


@dataclass
class Points(Data):
    """Data that bring a domain."""

    x: torch.Tensor
    set: Domain | None = None
    registered_name = "points"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    @property
    def class_names(self) -> list[str]:
        return []

    @property
    def domain(self) -> Domain | None:
        return self.set

    def split(self, name: str) -> TensorItems:
        return TensorItems(self.x, torch.zeros(len(self.x), dtype=torch.int64))


@pytest.mark.parametrize("dim, nu", [(6, 10.0), (3, 4.5)])
def test_student_t_has_its_second_moment_and_the_law_of_its_norm(dim: int, nu: float) -> None:
    """E |z|^2 = dim nu / (nu - 2), and |z|^2 / dim follows F(dim, nu): one chi-square for the whole vector, not one per coordinate."""
    z = student_t(noise_of(100_000), (100_000, dim), nu).double()
    square = z.square().sum(1) / dim
    assert kstest(square.numpy(), snedecor(dim, nu).cdf).statistic < 0.01  # 1.63 / sqrt(1e5) = 0.005 at 1 %
    if nu > 8:  # else the mean of squares itself has no finite variance
        assert abs(square.mean().item() * (nu - 2) / nu - 1) < 0.01
    assert z.mean(0).abs().max() < 0.02


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_uniform_law_give_finite_numbers(uniform: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noise, "uniform", lambda self, shape: torch.full(shape, uniform))
    z = student_t(noise_of(4), (4, 3), 10.0)
    assert z.isfinite().all() and (z != 0).all()


def test_infinite_degrees_are_the_normal_law() -> None:
    assert torch.equal(student_t(noise_of(50), (50, 2, 3), float("inf")), noise_of(50).normal((50, 2, 3)))


def test_prior_of_a_row_does_not_depend_on_its_neighbours() -> None:
    whole = student_t(noise_of(10), (10, 4), 3.0)
    part = student_t(Noise(3, torch.arange(5, 10)), (5, 4), 3.0)
    assert torch.equal(whole[5:], part)


@pytest.mark.parametrize(
    "domain, limit",
    [(Box(kappa=0.3), 1 / 0.3), (Ball(kappa=0.1), 10.0), (Box(barrier="log"), 1.0), (Box(barrier="atanh"), float("inf"))],
)
def test_degrees_follow_the_heaviest_moment(domain: Domain, limit: float, caplog: pytest.LogCaptureFixture) -> None:
    assert heaviest_moment(domain, 1.0) == pytest.approx(limit)
    data = Points(torch.rand(100, 2) * 0.5 + 0.1)
    space = Dual(domain=domain)
    with caplog.at_level(logging.WARNING):
        space.fit(data)
    assert space.degrees == pytest.approx(max(2.5, min(10.0, limit)))
    assert bool(caplog.records) == (limit < 2.5)
    with caplog.at_level(logging.WARNING):
        Dual(domain=Box(kappa=0.3), nu=10.0).fit(data)
    assert "lighter than the dual data" in caplog.records[-1].getMessage() and "lower kappa, or" in caplog.records[-1].getMessage()
    with caplog.at_level(logging.WARNING):
        Dual(domain=Box(barrier="log")).fit(data)
    assert caplog.records[-1].getMessage().endswith("only; set barrier: regularised")  # where no kappa is read


def test_tail_index_of_the_dual_of_uniform_data_is_beta_over_kappa() -> None:
    """Hill's estimate of the uniform law in a box: P(|z| > r) ~ r^(-1 / kappa), which is why nu must not exceed it."""
    x = noise_of(400_000).uniform((400_000, 1)).double()
    z = Box(kappa=0.3).to_dual(Box().interior(x, 1e-12)).abs().flatten().sort(descending=True).values
    hill = 1 / (z[:2000] / z[2000]).log().mean().item()
    assert hill == pytest.approx(1 / 0.3, rel=0.1)


@pytest.mark.parametrize("nu, deviation", [(None, 1.25**0.5), (3.0, 3**0.5), (float("inf"), 1.0), (1.5, 1.0)])
def test_standardises_what_it_measures_to_the_priors_deviation_and_comes_back(nu: float | None, deviation: float) -> None:
    x = Box(low=-1.0, high=1.0).uniform(noise_of(5000), (5000, 2)) * torch.tensor([0.9, 0.1])
    space = Dual(domain=Box(low=-1.0, high=1.0), nu=nu)
    space.fit(Points(x))
    z = space.encode(x)
    assert z.mean(0).abs().max() < 1e-3 and (z.std(0) - deviation).abs().max() < 1e-3
    torch.testing.assert_close(space.decode(z), x, rtol=0, atol=1e-5)
    again = build(
        Path,
        Document(
            {
                "name": "rectified_flow",
                "space": {"name": "dual", "domain": {"name": "box", "low": -1.0}, "nu": nu, "mean": space.mean, "std": space.std},
            },
            "x",
        ),
    )
    again.space.fit(Points(x))
    assert torch.equal(again.space.encode(x), z)


def test_images_are_standardised_by_one_number() -> None:
    x = Box().uniform(noise_of(50), (50, 1, 4, 4))
    space = Dual(domain=Box())
    space.fit(Points(x))
    assert len(space.mean or []) == len(space.std or []) == 1
    assert space.decode(space.encode(x)).shape == x.shape


def test_zeros_in_the_data_are_moved_inside() -> None:
    x = torch.tensor([[0.5, 0.0], [0.0, 1.0], [0.2, 0.3]])
    space = Dual(domain=Simplex(2), mean=[0.0, 0.0], std=[1.0, 1.0])
    space.fit(Points(x))
    z = space.encode(x)
    assert z.isfinite().all() and (space.decode(z) - x).abs().max() < 1e-5
    assert Simplex(2).contains(space.decode(z)).all()


def test_everything_decodes_to_the_inside() -> None:
    z = 1e3 * student_t(noise_of(1000), (1000, 2), 1.0)
    for domain in (Box(), Ball(), Simplex(2)):
        space = Dual(domain=domain, mean=[0.1, 0.2], std=[1.0, 2.0])
        space.fit(Points(torch.full((3, 2), 0.1)))
        assert domain.contains(space.decode(z)).all()


def test_the_domain_may_come_with_the_data_but_must_come() -> None:
    space = Dual()
    space.fit(Points(torch.full((9, 2), 0.3), Ball()))
    assert space.set == Ball()
    with pytest.raises(ValueError, match="name one"):
        Dual().fit(Checkerboard())
    with pytest.raises(ValueError, match="vectors"):
        Dual(domain=Simplex(3)).fit(Checkerboard())


@pytest.mark.parametrize("shape, numbers", [((3,), 3), ((1, 2, 2), 1)])
def test_moments_of_other_data_are_refused(shape: tuple[int, ...], numbers: int) -> None:
    data = Points(torch.full((9, *shape), 0.3))
    Dual(domain=Box(), mean=[0.0], std=[1.0]).fit(data)
    with pytest.raises(ValueError, match=f"mean and std have {numbers} numbers"):
        Dual(domain=Box(), mean=[0.0, 0.0], std=[1.0, 1.0]).fit(data)


def test_a_margin_that_no_point_has_is_named() -> None:
    with pytest.raises(ConfigError, match=r"path\.space\.margin: no point is 2\.0 away from both bounds.*; lower it"):
        Dual(domain=Box(), margin=2.0).fit(Points(torch.full((9, 2), 0.3)))


def test_a_prior_whose_draws_may_be_infinite_is_refused() -> None:
    assert student_t(noise_of(200_000), (200_000, 1), 1.0).isfinite().all()
    with pytest.raises(ConfigError, match=r"space\.nu: expected a number >= 1"):
        build(Path, Document({"name": "rectified_flow", "space": {"name": "dual", "nu": 0.1}}, "x.yaml"))


def test_what_a_network_lost_is_not_blamed_on_the_map() -> None:
    space = Dual(domain=Box(), mean=[0.0], std=[1.0])
    space.fit(Points(torch.full((9, 2), 0.3)))
    with pytest.raises(FloatingPointError, match=r"1 of 3 samples came out as NaN or infinity .*; take more steps or less guidance"):
        space.decode(torch.tensor([[0.0, 1.0], [math.nan, 0.0], [2.0, 2.0]]))


def test_mean_without_std_is_refused_where_it_stands() -> None:
    with pytest.raises(ConfigError, match="mean and std belong together"):
        build(Path, Document({"name": "rectified_flow", "space": {"name": "dual", "mean": [0.0]}}, "x.yaml"))
