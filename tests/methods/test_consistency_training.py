import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from gentrain.config import ConfigError, Document, build
from gentrain.methods.base import Clock, Method
from gentrain.methods.consistency_training import ConsistencyTraining, interval_probabilities, karras_levels
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.samplers.consistency import Consistency
from tests.methods.few_step import gradients_hold_calls_fixed
from tests.methods.toy import TinyNetwork, batch_of, nets_with, noise_of


def test_levels_and_their_probabilities_by_the_papers_formulas() -> None:
    count = 18
    levels = karras_levels(count - 1, 0.002, 80.0)
    expected = [(0.002 ** (1 / 7) + (i - 1) / (count - 1) * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for i in range(1, count + 1)]
    assert levels.tolist() == pytest.approx(expected)
    found = interval_probabilities(levels, -1.1, 2.0)
    mass = [math.erf((math.log(b) + 1.1) / (2**0.5 * 2)) - math.erf((math.log(a) + 1.1) / (2**0.5 * 2)) for a, b in pairwise(expected)]
    assert found.tolist() == pytest.approx([m / sum(mass) for m in mass])


def test_intervals_are_drawn_with_their_probabilities_and_share_the_noise() -> None:
    path, count, seen = VarianceExploding(), 40_000, []

    def network(x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        seen.append((x, (t / 250).exp()))
        return x

    x0 = batch_of(count)["x"].double()
    ConsistencyTraining().loss(8, nets_with(network, path, "edm"), {"x": x0}, noise_of(count))  # type: ignore[arg-type]
    (x_s, s), (x_t, t) = ((x * (level**2 + 0.25).sqrt()[:, None], level) for x, level in seen)
    torch.testing.assert_close((x_s - x0) / s[:, None], (x_t - x0) / t[:, None], rtol=1e-4, atol=1e-4)
    levels = karras_levels(8, 0.002, 80.0)
    index = (s[:, None] / levels - 1).abs().argmin(1)
    torch.testing.assert_close(t, levels[index + 1], rtol=1e-5, atol=1e-7)
    frequency = torch.bincount(index, minlength=8) / count
    assert (frequency - interval_probabilities(levels, -1.1, 2.0)).abs().max() < 0.01


def test_the_loss_is_the_row_huber_over_the_levels_distance() -> None:
    """A network whose x0 is its level, so that |f - f'| = (t - s) sqrt(2) and the loss is sqrt(2) but for the huber's constant."""
    path = VarianceExploding()

    class Level(nn.Module):
        def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
            return (t / 250).exp()[:, None].expand_as(x)

    loss = ConsistencyTraining(lowest=0.1).loss(3, nets_with(Level(), path, "x0"), {"x": batch_of(64)["x"].double()}, noise_of(64)).value
    assert loss.item() == pytest.approx(2**0.5, rel=5e-3)


def test_the_target_is_held_fixed() -> None:
    def loss(module: nn.Module) -> Tensor:
        return ConsistencyTraining().loss(20, nets_with(module, RectifiedFlow(), "velocity"), batch_of(64), noise_of(64)).value

    assert gradients_hold_calls_fixed(loss, TinyNetwork(), frozen=(0,)) == 2


def test_the_grid_doubles_and_ends_where_samplers_begin() -> None:
    method = ConsistencyTraining(first_intervals=4, last_intervals=16)
    counts = []
    for samples in (0, 10, 20, 29):
        (update,) = method.updates(Clock(samples, 1, 30))
        (loss,) = update.losses
        assert isinstance(loss, partial)
        counts.append(loss.args[0])
    assert counts == [4, 8, 16, 16]
    seen: list[float] = []

    def network(x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        seen.append(t.max().item())
        return x

    method.loss(1, nets_with(network, RectifiedFlow(), "velocity"), batch_of(4), noise_of(4))  # type: ignore[arg-type]
    assert seen[1] == 1000.0


class Scaled(nn.Module):
    """The consistency function of points at the origin, f = 0, as F of EDM with an error."""

    def __init__(self) -> None:
        super().__init__()
        self.error = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        sigma = (t / 250).exp()[:, None]
        # x0 = x / (4 sigma^2 + 1) + 2 sigma / sqrt(4 sigma^2 + 1) F ... = 0 for this F
        return -(1 - self.error) * x * 0.5 / sigma


def test_a_wrong_function_is_drawn_to_the_right_one() -> None:
    path, network = VarianceExploding(), Scaled()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    for step in range(100):
        optimizer.zero_grad()
        batch = {"x": torch.zeros(128, 2)}
        ConsistencyTraining().loss(40, nets_with(network, path, "edm"), batch, noise_of(128, 128 * step)).value.backward()
        optimizer.step()
    assert abs(network.error.item()) < 0.02
    with torch.no_grad():
        x = Consistency(steps=1).sample(Denoiser(network, path, "edm"), (100, 2), noise_of(100))
    assert x.abs().max() < 5


def test_labels_are_dropped_in_both_calls() -> None:
    network = TinyNetwork()
    path: Path = RectifiedFlow()
    ConsistencyTraining(label_dropout=1.0).loss(4, nets_with(network, path, "velocity"), batch_of(8), noise_of(8))
    assert all((seen == -1).all() for seen in network.seen) and len(network.seen) == 2
    ConsistencyTraining().loss(4, nets_with(network, path, "velocity"), batch_of(8), noise_of(8))
    assert torch.equal(network.seen[-1], batch_of(8)["label"])


def test_mistakes_are_told_as_the_configuration_loads() -> None:
    for settings, message in (
        ({"first_intervals": 9, "last_intervals": 8}, "must not exceed"),
        ({"lowest": 90}, "must be below highest"),
        ({"last_intervals": 1_000_001}, "neighbours of 1000001 intervals are one time in float32; take at most 1000000"),
        ({"mean": 80.0}, r"never comes between 0\.002 and 80; .* choose it in -6\.2 to 4\.4"),  # the level itself, and not its logarithm
    ):
        with pytest.raises(ConfigError, match=message):
            build(Method, Document({"name": "consistency_training", **settings}, "x.yaml"))
