import pytest
import torch

from gentrain.paths.variance_preserving import VariancePreserving

DIFFUSERS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


@pytest.mark.parametrize("schedule", DIFFUSERS)
def test_equals_diffusers_noise_levels(schedule: str) -> None:
    """Up to the rounding of diffusers' own float32 table: its 1 - alpha_bar has lost four digits near the data."""
    from diffusers import DDIMScheduler

    alpha_bar = DDIMScheduler(beta_schedule=DIFFUSERS[schedule], beta_start=0.001, beta_end=0.015).alphas_cumprod.double()
    path = VariancePreserving(schedule=schedule, beta_start=0.001, beta_end=0.015)
    t = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t) ** 2, alpha_bar, rtol=3e-5, atol=0)
    torch.testing.assert_close(path.sigma(t) ** 2, 1 - alpha_bar, rtol=2e-5, atol=2e-7)


def test_variance_is_preserved_between_timesteps() -> None:
    path, t = VariancePreserving(), torch.linspace(0, 999, 5000, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t))


def test_log_snr_is_linear_between_timesteps() -> None:
    path = VariancePreserving(schedule="cosine")
    k = torch.arange(999, dtype=torch.float64)
    torch.testing.assert_close(path.log_snr(k + 0.25), 0.75 * path.log_snr(k) + 0.25 * path.log_snr(k + 1))


def test_sampling_times_are_diffusers_trailing_timesteps() -> None:
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing")
    for steps in (1, 3, 7, 20, 64, 400, 1000):
        scheduler.set_timesteps(steps)
        assert VariancePreserving().sampling_times(steps).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"num_train_timesteps": 1}, "at least 2"), ({"beta_start": 0.03}, "beta_start <= beta_end"), ({"beta_end": 1.0}, "beta_end < 1")],
)
def test_impossible_schedules_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VariancePreserving(**fields)


def test_more_steps_than_timesteps_are_refused() -> None:
    with pytest.raises(ValueError, match="at most that many"):
        VariancePreserving(num_train_timesteps=10).sampling_times(11)
