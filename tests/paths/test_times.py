"""Each law is checked against scipy's distribution by feeding it the quantiles of the uniform distribution."""

import numpy as np
import pytest
import torch

from gentrain.paths.base import Path, TimeLaw
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.times import Discrete, LogitNormal, LogNormal, Uniform
from gentrain.paths.trigflow import TrigFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.paths.variance_preserving import VariancePreserving

QUANTILES = (torch.arange(999, dtype=torch.float64) + 0.5) / 999
every_path = pytest.mark.parametrize("path", [VariancePreserving(), VarianceExploding(), RectifiedFlow(), TrigFlow()])


@every_path
@pytest.mark.parametrize("law", [Uniform(), LogNormal(), LogitNormal(), Discrete()])
def test_times_lie_on_the_path_and_rise_with_the_uniform_numbers(law: TimeLaw, path: Path) -> None:
    uniform = torch.tensor([0.0, 2**-24, 1e-3, 0.5, 0.999, 1 - 2**-24])  # both ends of what noise.uniform can give
    t = law.sample(uniform, path)
    assert t.dtype == torch.float32 and t.shape == uniform.shape and t.isfinite().all()
    end = torch.tensor(path.t_max)
    assert (t >= torch.tensor(path.t_min)).all() and (t <= end * (1 + 1e-6)).all() and (t.diff() >= 0).all()


@every_path
def test_uniform(path: Path) -> None:
    t = Uniform().sample(QUANTILES, path)
    torch.testing.assert_close(t, path.t_min + (path.t_max - path.t_min) * QUANTILES)


@every_path
def test_log_normal_gives_every_path_the_same_noise_to_signal_ratios(path: Path) -> None:
    from scipy import stats

    t = LogNormal(mean=-0.5, std=0.7).sample(QUANTILES, path)
    expected = torch.from_numpy(stats.norm(-0.5, 0.7).ppf(QUANTILES.numpy()))
    torch.testing.assert_close((path.sigma(t) / path.alpha(t)).log(), expected, rtol=1e-8, atol=1e-8)


def test_log_normal_defaults_are_those_of_edm() -> None:
    from scipy import stats

    log_sigma = LogNormal().sample(QUANTILES, VarianceExploding()).log().numpy()
    assert stats.kstest(log_sigma, stats.norm(-1.2, 1.2).cdf).statistic < 1e-3


def test_logit_normal_on_the_rectified_flow_has_its_closed_form_density() -> None:
    t = LogitNormal(mean=0.3, std=0.8).sample(QUANTILES, RectifiedFlow()).numpy()

    def density(time: np.ndarray) -> np.ndarray:
        """Stable Diffusion 3, eq. 19."""
        logit = np.log(time / (1 - time))
        return np.exp(-((logit - 0.3) ** 2) / (2 * 0.8**2)) / (0.8 * np.sqrt(2 * np.pi) * time * (1 - time))

    middle = (t[1:] + t[:-1]) / 2
    np.testing.assert_allclose(density(middle) * np.diff(t), 1 / 999, rtol=0.02)
    torch.testing.assert_close(
        LogNormal(mean=0.3, std=0.8).sample(QUANTILES, RectifiedFlow()), LogitNormal(mean=0.3, std=0.8).sample(QUANTILES, RectifiedFlow())
    )


def test_logit_normal_is_a_law_over_the_position_in_time_elsewhere() -> None:
    position = LogitNormal().sample(QUANTILES, RectifiedFlow())
    torch.testing.assert_close(LogitNormal().sample(QUANTILES, VariancePreserving()), 999 * position)


def test_discrete_draws_every_timestep_equally_often() -> None:
    t = Discrete(count=50).sample((torch.arange(5000) + 0.5) / 5000, VariancePreserving(num_train_timesteps=50))
    assert (t == t.round()).all()
    assert torch.bincount(t.long(), minlength=50).tolist() == [100] * 50


def test_discrete_needs_both_ends() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Discrete(count=1)
