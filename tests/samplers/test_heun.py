import pytest

from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.trigflow import TrigFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.heun import Heun
from tests.samplers.toy import convergence_orders, difference_from_diffusers


@pytest.mark.parametrize("steps", [2, 7, 20])
def test_equals_diffusers_on_the_rectified_flow(steps: int) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    scheduler = FlowMatchHeunDiscreteScheduler(num_train_timesteps=steps)
    sampler = Heun(steps=steps, guidance=2.0)
    assert difference_from_diffusers(sampler, RectifiedFlow(), "velocity", scheduler, time_scale=1000 / steps, start=1.0) < 1e-5


@pytest.mark.parametrize("spacing", ["path", "karras"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_equals_diffusers_on_the_variance_preserving_path(schedule: str, prediction: str, spacing: str) -> None:
    """Tolerance as in Euler's test."""
    sampler, path = Heun(steps=20, guidance=2.0, spacing=spacing), VariancePreserving(schedule=schedule)
    assert difference_from_diffusers(sampler, path, prediction, sampler.diffusers_scheduler(path, prediction)) < 5e-5


@pytest.mark.parametrize(
    ("path", "spacing"),
    [(RectifiedFlow(), "path"), (TrigFlow(), "path"), (VarianceExploding(), "path"), (VariancePreserving(), "karras")],
)
def test_converges_at_order_two(path: Path, spacing: str) -> None:
    orders = convergence_orders(Heun, path, [25, 50, 100], spacing=spacing)
    assert all(1.9 < order < 2.3 for order in orders), orders


@pytest.mark.parametrize(
    ("path", "prediction"), [(RectifiedFlow(), "velocity"), (VarianceExploding(), "edm"), (VariancePreserving(), "x0")]
)
def test_no_scheduler_is_offered_where_none_fits(path: Path, prediction: str) -> None:
    assert Heun().diffusers_scheduler(path, prediction) is None
