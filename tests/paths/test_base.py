"""What every path must satisfy, in float64."""

import math

import pytest
import torch

from gentrain.paths.base import Path, convert_time
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.trigflow import TrigFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.paths.variance_preserving import VariancePreserving

PATHS = {
    "linear": VariancePreserving(),
    "scaled_linear": VariancePreserving(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": VariancePreserving(schedule="cosine"),
    "variance_exploding": VarianceExploding(),
    "rectified_flow": RectifiedFlow(),
    "trigflow": TrigFlow(),
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def inner_times(path: Path, count: int = 401) -> torch.Tensor:
    """Times off the ends and off the timesteps, where the variance-preserving path has kinks."""
    fraction = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return path.t_min + (path.t_max - path.t_min) * fraction


@every_path
def test_time_of_log_snr_inverts_log_snr(path: Path) -> None:
    t = inner_times(path)
    torch.testing.assert_close(path.time_of_log_snr(path.log_snr(t)), t, rtol=1e-9, atol=1e-9)


@every_path
def test_log_snr_decreases(path: Path) -> None:
    assert (path.log_snr(inner_times(path)).diff() < 0).all()


@every_path
def test_log_snr_is_that_of_alpha_and_sigma(path: Path) -> None:
    t = inner_times(path)
    torch.testing.assert_close(path.log_snr(t), 2 * (path.alpha(t) / path.sigma(t)).log(), rtol=1e-9, atol=1e-12)


@every_path
def test_derivatives_are_exact(path: Path) -> None:
    t = inner_times(path).requires_grad_()
    for value, prime in ((path.alpha, path.alpha_prime), (path.sigma, path.sigma_prime)):
        output = value(t)
        expected = torch.autograd.grad(output.sum(), t)[0] if output.requires_grad else torch.zeros_like(t)
        torch.testing.assert_close(prime(t), expected, rtol=1e-10, atol=1e-13)


@every_path
def test_velocity_is_the_derivative_of_perturb(path: Path) -> None:
    torch.manual_seed(0)
    t, (x0, eps) = inner_times(path), torch.randn(2, 401, 3, dtype=torch.float64)
    _, expected = torch.func.jvp(lambda time: path.perturb(x0, eps, time), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(path.velocity(x0, eps, t), expected, rtol=1e-10, atol=1e-12)


@every_path
def test_perturb_is_inverted_with_alpha_and_sigma(path: Path) -> None:
    torch.manual_seed(0)
    t, (x0, eps) = inner_times(path), torch.randn(2, 401, 2, 3, dtype=torch.float64)
    x_t = path.perturb(x0, eps, t)
    alpha, sigma = path.alpha(t)[:, None, None], path.sigma(t)[:, None, None]
    torch.testing.assert_close((x_t - sigma * eps) / alpha, x0, rtol=1e-8, atol=1e-8)


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_finite_and_in_range(path: Path, dtype: torch.dtype) -> None:
    ends = torch.tensor([path.t_min, path.t_max], dtype=dtype)
    for function in (path.alpha, path.sigma, path.alpha_prime, path.sigma_prime, path.network_time):
        assert function(ends).isfinite().all() and function(ends).dtype == dtype
    assert (path.alpha(ends) >= 0).all() and (path.sigma(ends) >= 0).all()
    assert not path.log_snr(ends).isnan().any()
    torch.testing.assert_close(path.time_of_log_snr(path.log_snr(ends)), ends, rtol=1e-5, atol=1e-6)
    infinite = torch.tensor([math.inf, -math.inf], dtype=dtype)
    torch.testing.assert_close(path.time_of_log_snr(infinite), ends, rtol=1e-6, atol=1e-6)


@every_path
@pytest.mark.parametrize("other", PATHS.values(), ids=PATHS.keys())
def test_conversion_round_trips_where_both_reach(path: Path, other: Path) -> None:
    t = inner_times(path)
    log_snr = path.log_snr(t)
    low, high = (other.log_snr(torch.tensor(end, dtype=torch.float64)) for end in (other.t_max, other.t_min))
    t = t[(log_snr > low) & (log_snr < high)]
    assert len(t) > 50
    converted = convert_time(t, path, other)
    torch.testing.assert_close(other.log_snr(converted), path.log_snr(t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(convert_time(converted, other, path), t, rtol=1e-8, atol=1e-8)


def test_conversion_beyond_the_other_path_is_its_end() -> None:
    t = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(convert_time(t, RectifiedFlow(), VarianceExploding()), torch.tensor([0.002, 80.0]))
    torch.testing.assert_close(convert_time(t, RectifiedFlow(), VariancePreserving()), torch.tensor([0.0, 999.0]))


@every_path
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_sampling_times_walk_down_from_the_noise(path: Path, steps: int) -> None:
    times = path.sampling_times(steps)
    assert times.shape == (steps,) and times.dtype == torch.float64
    torch.testing.assert_close(times[0].item(), path.t_max)
    assert (times.diff() < 0).all() and times[-1] >= path.t_min and (path.sigma(times) > 0).all()


@pytest.mark.parametrize("path", [PATHS["linear"], PATHS["cosine"], PATHS["variance_exploding"]])
def test_karras_times_are_equally_spaced_in_the_seventh_root(path: Path) -> None:
    times = path.karras_times(9)
    root = (path.sigma(times) / path.alpha(times)) ** (1 / 7)
    torch.testing.assert_close(root.diff(), root.diff().mean().expand(8), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(times[[0, -1]], torch.tensor([path.t_max, path.t_min], dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", [RectifiedFlow(), TrigFlow()])
def test_karras_times_do_not_exist_on_a_path_that_ends_in_pure_noise(path: Path) -> None:
    with pytest.raises(ValueError, match="use spacing: path"):
        path.karras_times(4)
