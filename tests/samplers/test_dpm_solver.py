import pytest

from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.dpm_solver import DPMSolver
from tests.samplers.toy import convergence_orders, difference_from_diffusers


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_equals_diffusers_on_the_variance_preserving_path(schedule: str, prediction: str, steps: int) -> None:
    sampler, path = DPMSolver(steps=steps, guidance=2.0), VariancePreserving(schedule=schedule)
    assert difference_from_diffusers(sampler, path, prediction, sampler.diffusers_scheduler(path, prediction)) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_equals_diffusers_edm_solver(steps: int) -> None:
    sampler, path = DPMSolver(steps=steps, guidance=2.0), VarianceExploding(sigma_max=50.0, sigma_data=0.7)
    scheduler = sampler.diffusers_scheduler(path, "edm")
    assert difference_from_diffusers(sampler, path, "edm", scheduler, time_scale=1000.0, start=50.0) < 1e-5


@pytest.mark.parametrize(("path", "spacing"), [(VarianceExploding(), "path"), (VariancePreserving(), "karras")])
def test_converges_at_order_two(path: Path, spacing: str) -> None:
    orders = convergence_orders(DPMSolver, path, [25, 50, 100], spacing=spacing)
    assert all(1.9 < order < 2.4 for order in orders), orders


def test_approaches_order_two_from_pure_noise() -> None:
    """The first step, from a log-SNR of minus infinity, is of first order: it costs the coarse grids part of theirs."""
    orders = convergence_orders(DPMSolver, RectifiedFlow(), [64, 128, 256, 512])
    assert orders == sorted(orders) and orders[0] > 1.65 and orders[-1] < 2.1, orders


@pytest.mark.parametrize(("path", "spacing"), [(RectifiedFlow(), "path"), (VariancePreserving(), "karras")])
def test_no_scheduler_is_offered_where_none_fits(path: Path, spacing: str) -> None:
    assert DPMSolver(spacing=spacing).diffusers_scheduler(path, "v") is None
