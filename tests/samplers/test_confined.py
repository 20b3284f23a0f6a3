import pytest
import torch

from gentrain.domains.box import Box
from gentrain.domains.simplex import Simplex
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.samplers.confined import Confined
from gentrain.samplers.euler import Euler

COUNT = 5000
BOX = Box(-1.0, 1.0)


def noise_of(count: int) -> Noise:
    return Noise(1, torch.arange(count))


def normal_denoiser() -> Denoiser:
    """Exact for data N(0, 0.7^2), a sixth of which lies outside of (-1, 1)."""

    def network(x: torch.Tensor, t: torch.Tensor, condition: dict | None) -> torch.Tensor:
        t = t[:, None] / 1000
        variance = 0.49 * (1 - t) ** 2 + t**2
        return x * (t - 0.49 * (1 - t)) / variance

    return Denoiser(network, RectifiedFlow(), "velocity")


def test_projection_moves_what_is_outside_to_the_wall_and_nothing_else() -> None:
    plain = Euler(steps=20).sample(normal_denoiser(), (COUNT, 1), noise_of(COUNT))
    x = Confined(domain=BOX, steps=20).sample(normal_denoiser(), (COUNT, 1), noise_of(COUNT))
    assert BOX.contains(x).all() and not BOX.contains(plain).all()
    inside = BOX.contains(plain)
    assert torch.equal(x[inside], plain[inside]) and (x[~inside].abs() > 0.999).all()


def test_rejection_is_the_truncated_law() -> None:
    x = Confined(domain=BOX, by="rejection", steps=20).sample(normal_denoiser(), (COUNT, 1), noise_of(COUNT))
    assert BOX.contains(x).all()
    accepted = Euler(steps=20).sample(normal_denoiser(), (4 * COUNT, 1), Noise(2, torch.arange(4 * COUNT)))
    accepted = accepted[BOX.contains(accepted)]
    assert abs(x.std() - accepted.std()) < 0.02
    assert (x.abs() > 0.999).float().mean() < 0.01


def test_rejection_gives_up_where_nothing_is_inside() -> None:
    with pytest.raises(ValueError, match="lay outside in all of 3 rounds"):
        Confined(domain=Box(50.0, 51.0), by="rejection", attempts=3).sample(normal_denoiser(), (4, 1), noise_of(4))


def test_thresholding_bounds_the_guided_prediction_at_every_step() -> None:
    """Guidance pushes x0 predictions to +-10 times the label: the threshold must come after it, not before."""
    seen = []

    def network(x: torch.Tensor, t: torch.Tensor, condition: dict | None) -> torch.Tensor:
        seen.append(x)
        assert condition is not None
        return condition["label"][:, None].clamp(min=0).float() * 0.9 + 0 * x  # predicts x0 = 0.9 for class 1, 0 for null

    denoiser = Denoiser(network, RectifiedFlow(), "x0")
    sampler = Confined(domain=BOX, by="thresholding", steps=4, guidance=10.0)
    x = sampler.sample(denoiser, (6, 1), noise_of(6), {"label": torch.ones(6, dtype=torch.int64)})
    assert BOX.contains(x).all() and (x > 0.999).all()
    start = seen[0][:6]
    torch.testing.assert_close(seen[1][:6], 0.75 * start + 0.25 * 1.0, rtol=1e-5, atol=1e-5)  # x0 = 1, not 9


def test_samples_of_another_shape_than_the_domains_are_refused() -> None:
    with pytest.raises(ValueError, match=r"simplex is for vectors \(4,\), got samples of shape \(1,\)"):
        Confined(domain=Simplex(4)).sample(normal_denoiser(), (5, 1), noise_of(5))
