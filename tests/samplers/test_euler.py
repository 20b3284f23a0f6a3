import pytest

from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.trigflow import TrigFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.base import Sampler
from gentrain.samplers.euler import Euler
from gentrain.samplers.heun import Heun
from tests.samplers.toy import convergence_orders, difference_from_diffusers


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_equals_diffusers_on_the_rectified_flow(steps: int, guidance: float) -> None:
    sampler, path = Euler(steps=steps, guidance=guidance), RectifiedFlow()
    scheduler = sampler.diffusers_scheduler(path, "velocity")
    sigmas = [1 - step / steps for step in range(steps)]
    assert difference_from_diffusers(sampler, path, "velocity", scheduler, start=1.0, set_timesteps={"sigmas": sigmas}) < 1e-5


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_equals_diffusers_edm_euler(steps: int) -> None:
    sampler, path = Euler(steps=steps, guidance=2.0), VarianceExploding(sigma_max=50.0, sigma_data=0.7)
    scheduler = sampler.diffusers_scheduler(path, "edm")
    assert difference_from_diffusers(sampler, path, "edm", scheduler, time_scale=1000.0, start=50.0) < 1e-5


@pytest.mark.parametrize("spacing", ["path", "karras"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_equals_diffusers_on_the_variance_preserving_path(schedule: str, prediction: str, spacing: str) -> None:
    """x / alpha, in which both walk, begins at 157 standard deviations (linear): float32 keeps some 1e-5 of the samples' scale."""
    sampler, path = Euler(steps=20, spacing=spacing), VariancePreserving(schedule=schedule)
    assert difference_from_diffusers(sampler, path, prediction, sampler.diffusers_scheduler(path, prediction)) < 5e-5


@pytest.mark.parametrize("sampler", [Euler(steps=1, spacing="karras"), Heun(steps=1, spacing="karras")])
def test_one_karras_step_equals_diffusers(sampler: Sampler) -> None:
    """Its only time is the noisiest, where diffusers' "linspace" would put the cleanest."""
    path = VariancePreserving()
    assert difference_from_diffusers(sampler, path, "eps", sampler.diffusers_scheduler(path, "eps")) < 5e-5


def test_equals_diffusers_on_the_cosine_schedule() -> None:
    """There x / alpha begins at 20,000 standard deviations."""
    sampler, path = Euler(steps=20), VariancePreserving(schedule="cosine")
    assert difference_from_diffusers(sampler, path, "eps", sampler.diffusers_scheduler(path, "eps")) < 3e-4


@pytest.mark.parametrize("path", [RectifiedFlow(), TrigFlow(), VarianceExploding(), VariancePreserving()])
def test_converges_at_order_one(path: Path) -> None:
    orders = convergence_orders(Euler, path, [32, 64, 128])
    assert all(0.9 < order < 1.1 for order in orders), orders


@pytest.mark.parametrize(
    ("path", "prediction"), [(TrigFlow(), "velocity"), (RectifiedFlow(), "x0"), (VarianceExploding(), "eps"), (VariancePreserving(), "edm")]
)
def test_no_scheduler_is_offered_where_none_fits(path: Path, prediction: str) -> None:
    assert Euler().diffusers_scheduler(path, prediction) is None


def test_karras_spacing_on_a_path_without_it_is_refused() -> None:
    with pytest.raises(ValueError, match="use spacing: path"):
        Euler(spacing="karras").grid(RectifiedFlow())
