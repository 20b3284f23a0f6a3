"""The bound on the divergence of two models against closed forms of normal laws, in float64."""

import math

import pytest
import torch
from torch import Tensor

from gentrain.metrics.divergence import NOISES, divergence_bound
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path, expand
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.variance_preserving import VariancePreserving

DEVIATION, OTHER_MEAN, OTHER_DEVIATION = 0.5, 0.4, 0.9
COUNT, DIM = 4_000, 3
PATHS: list[Path] = [RectifiedFlow(), VariancePreserving()]


def knowing(mean: float, deviation: float, path: Path) -> Denoiser:
    """Of N(mean + label, deviation^2) in each coordinate: the posterior mean of x0 is what the network gives."""
    unit = path.network_time(torch.ones(()))

    def network(x: Tensor, timestep: Tensor, condition: Condition | None) -> Tensor:
        t = timestep / unit
        alpha, sigma = expand(path.alpha(t), x), expand(path.sigma(t), x)
        here = mean if condition is None else mean + expand(condition["label"].double(), x)
        return here + alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2) * (x - alpha * here)

    return Denoiser(network, path, "x0")


def kl(mean: float, deviation: float, other_mean: float, other_deviation: float, ratio: float) -> float:
    """Of DIM independent coordinates with noise of that ratio added to both laws."""
    a, b = deviation**2 + ratio**2, other_deviation**2 + ratio**2
    return DIM / 2 * (a / b - 1 + math.log(b / a) + (mean - other_mean) ** 2 / b)


def bound(truth: Denoiser, other: Denoiser, deviation: float, condition: Condition | None = None, mean: float = 0.0) -> Tensor:
    noise = Noise(0, torch.arange(COUNT))
    x0 = mean + deviation * noise.normal((COUNT, DIM), torch.float64)
    return divergence_bound(truth, other, x0, noise, condition, draws=16)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.registered_name)
def test_it_is_the_divergence_of_models_that_know_their_own_law(path: Path) -> None:
    """And that of the first from the second, not the other way round: 0.99 and 2.39 nats at ratio 0.02."""
    one, two = knowing(0.0, DEVIATION, path), knowing(OTHER_MEAN, OTHER_DEVIATION, path)
    low, high = NOISES
    expected = [kl(0.0, DEVIATION, OTHER_MEAN, OTHER_DEVIATION, ratio) for ratio in (low, high)]
    assert bound(one, two, DEVIATION).mean().item() == pytest.approx(expected[0] - expected[1], rel=0.02)
    back = [kl(OTHER_MEAN, OTHER_DEVIATION, 0.0, DEVIATION, ratio) for ratio in (low, high)]
    assert bound(two, one, OTHER_DEVIATION, mean=OTHER_MEAN).mean().item() == pytest.approx(back[0] - back[1], rel=0.02)
    assert back[0] > 2 * expected[0]


def test_a_shift_costs_the_same_wherever_it_is_drawn() -> None:
    """Two laws of one deviation s, moved by m: each sample's integral is DIM m^2 / 2 (1 / (s^2 + low^2) - 1 / (s^2 + high^2)), its mean
    over random levels only."""
    one, two = (knowing(mean, DEVIATION, PATHS[0]) for mean in (0.0, OTHER_MEAN))
    expected = [kl(0.0, DEVIATION, OTHER_MEAN, DEVIATION, ratio) for ratio in NOISES]
    found = bound(one, two, DEVIATION)
    assert found.shape == (COUNT,) and found.dtype == torch.float64
    torch.testing.assert_close(found, torch.full_like(found, expected[0] - expected[1]), rtol=2e-2, atol=0)


def test_both_are_asked_for_the_samples_own_condition() -> None:
    one, two = knowing(0.0, DEVIATION, PATHS[0]), knowing(OTHER_MEAN, DEVIATION, PATHS[0])
    label = torch.arange(COUNT) % 2
    x0 = label[:, None] + DEVIATION * Noise(1, torch.arange(COUNT)).normal((COUNT, DIM), torch.float64)
    found = divergence_bound(one, two, x0, Noise(0, torch.arange(COUNT)), {"label": label}, draws=16).mean().item()
    assert found == pytest.approx(bound(one, two, DEVIATION).mean().item(), rel=0.02)
    apart = divergence_bound(one, one, x0, Noise(0, torch.arange(COUNT)), {"label": label})
    assert apart.abs().max() == 0
