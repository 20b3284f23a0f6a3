import pytest
import torch
from scipy.stats import kstest

from gentrain.domains import heat_kernel
from gentrain.domains.ball import Ball
from gentrain.domains.box import Box
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.inside import Inside
from gentrain.paths.reflected_heat import ReflectedHeat
from gentrain.paths.variance_exploding import VarianceExploding


def path_on(low: float = 0.0, high: float = 1.0, **fields: float) -> ReflectedHeat:
    return ReflectedHeat(space=Inside(domain=Box(low, high)), **fields)


def test_x_t_has_the_law_of_the_kernel() -> None:
    path, count = path_on(), 50_000
    x0, t = torch.full((count, 1), 0.1), torch.full((count,), 0.5)
    x_t = path.perturb(x0, path.draw_eps(Noise(0, torch.arange(count)), (count, 1)), t)
    assert path.box.contains(x_t).all()
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None]
    density = path.box.heat_kernel_log_density(grid, torch.full_like(grid, 0.1), path.sigma(torch.tensor(0.5)).item()).exp()[:, 0]
    distribution = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(density, grid[:, 0])])
    from numpy import interp

    result = kstest(x_t[:, 0].numpy(), lambda x: interp(x, grid[:, 0].numpy(), distribution.numpy()))
    assert result.statistic < 0.01


def test_at_the_end_it_is_uniform_whatever_the_start() -> None:
    path, count = path_on(-1.0, 1.0), 50_000
    eps = path.draw_eps(Noise(0, torch.arange(count)), (count, 1))
    x_t = path.perturb(torch.full((count, 1), 0.9), eps, torch.ones(count))
    assert kstest(x_t[:, 0].numpy() / 2 + 0.5, "uniform").statistic < 0.01
    assert path.start == 1.0


def test_time_is_linear_in_log_sigma_and_inverted() -> None:
    path = path_on(sigma_min=0.01, sigma_max=10.0)
    t = torch.tensor([0.0, 1 / 3, 1.0], dtype=torch.float64)
    torch.testing.assert_close(path.sigma(t), torch.tensor([0.01, 0.1, 10.0], dtype=torch.float64))
    torch.testing.assert_close(path.time_of_log_snr(path.log_snr(t)), t)
    step = 1e-6
    torch.testing.assert_close(path.sigma_prime(t), (path.sigma(t + step) - path.sigma(t - step)) / (2 * step), rtol=1e-6, atol=0)
    torch.testing.assert_close(path.network_time(t), 1000 * t)


def test_the_probability_flow_is_minus_half_g_squared_score() -> None:
    path, x, t = path_on(), torch.rand(5, 3), torch.full((5,), 0.4)
    denoiser = Denoiser(lambda x, t, condition: x.sin(), path, "eps")
    g_squared = 2 * path.sigma(t) * path.sigma_prime(t)
    torch.testing.assert_close(denoiser.velocity(x, t), -0.5 * g_squared[:, None] * denoiser.score(x, t))


@pytest.mark.parametrize("width, box", [(1.0, Box(0.0, 1.0)), (2.0, Box([-1.0, 0.0], [1.0, 0.5]))])
def test_the_scale_of_eps_is_the_root_of_the_kernels_information(width: float, box: Box) -> None:
    """sigma^2 E |score|^2 over x0 and x_t, by quadrature on the widest side; 1 for small steps, and never so small that float32 is lost."""
    path = ReflectedHeat(space=Inside(domain=box))
    x = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    x, x0 = (side.flatten() for side in torch.meshgrid(x, x, indexing="ij"))
    for level in (0.02, 0.1, 0.2, 0.3, 0.5, 0.8, 1.1):
        sigma = torch.tensor(level, dtype=torch.float64)
        density, score = heat_kernel.log_density(x, x0, sigma).exp(), heat_kernel.score(x, x0, sigma)
        exact = level * (density * score.square()).mean().sqrt()
        found = path.eps_scale(path.time_of_log_snr(-2 * (width * sigma).log()))
        assert abs(float(found / exact) - 1) < 0.1
    ends = path.eps_scale(torch.tensor([0.0, 1.0]))
    assert ends[0] == pytest.approx(1, abs=1e-3) and ends[1] == pytest.approx(1e-3)


def test_an_eps_network_is_read_in_units_of_that_scale() -> None:
    path, t = path_on(), torch.tensor([0.1, 0.9])
    denoiser = Denoiser(lambda x, t, condition: torch.full_like(x, 3.0), path, "eps")
    torch.testing.assert_close(denoiser.eps(torch.zeros(2, 1), t)[:, 0], 3 * path.eps_scale(t))
    assert path.eps_scale(t)[1] < 0.5 * path.eps_scale(t)[0]
    assert Denoiser(lambda x, t, condition: x, VarianceExploding(), "eps").path.eps_scale(t).tolist() == [1.0, 1.0]


def test_half_precision_is_folded_in_float32() -> None:
    path = path_on()
    x0, eps, t = torch.full((2000, 1), 0.5), torch.linspace(-3, 3, 2000)[:, None], torch.full((2000,), 0.6)
    x_t = path.perturb(*(value.bfloat16() for value in (x0, eps, t)))
    assert x_t.dtype == torch.float32 and path.box.contains(x_t).all()


def test_wrong_sets_and_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="must be below"):
        path_on(sigma_min=1.0, sigma_max=0.5)
    with pytest.raises(ValueError, match="on boxes only"):
        ReflectedHeat(space=Inside(domain=Ball())).require_fit()
    with pytest.raises(ValueError, match="set it to 5 widths, 10"):
        path_on(-1.0, 1.0, sigma_max=2.0).require_fit()
