import copy

import pytest
import torch

from gentrain.config import Document, build
from gentrain.methods.base import Clock, Method
from gentrain.methods.flow_matching import FlowMatching, flow_matching_loss
from gentrain.models.base import Condition
from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.times import LogitNormal, LogNormal, Uniform
from gentrain.paths.trigflow import TrigFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.paths.variance_preserving import VariancePreserving
from tests.methods.toy import TinyNetwork, batch_of, fall_of, nets_with, noise_of


def test_loss_is_the_mean_squared_error_of_each_row() -> None:
    loss = flow_matching_loss(torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]]), torch.tensor([[[0.0, 0.0]], [[3.0, 1.0]]]))
    assert loss.tolist() == [2.5, 5.0]


class Zero(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: Condition | None = None) -> torch.Tensor:
        return torch.zeros_like(x)


def test_loss_of_zero_velocity_is_the_velocity_variance() -> None:
    """E (eps - x0)^2 = 1 + 0.25 for data of deviation 0.5, whatever the law of t."""
    loss = FlowMatching().loss(nets_with(Zero(), RectifiedFlow(), "velocity"), batch_of(100_000), noise_of(100_000)).value
    assert abs(loss.item() - 1.25) < 0.02


class BestLinear(torch.nn.Module):
    """E[eps - x0 | x_t] for Gaussian data of deviation 0.5, times a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: Condition | None = None) -> torch.Tensor:
        t = t[:, None] / 1000
        return self.factor * x * (t - 0.25 * (1 - t)) / (t**2 + 0.25 * (1 - t) ** 2)


def test_the_conditional_expectation_of_the_velocity_is_the_optimum() -> None:
    """There the derivative by its factor is 0, and the loss E[0.25 / (t^2 + 0.25 (1 - t)^2)], which quadrature gives for uniform t."""
    network, count = BestLinear(), 200_000
    loss = FlowMatching(times=Uniform()).loss(nets_with(network, RectifiedFlow(), "velocity"), batch_of(count), noise_of(count)).value
    loss.backward()
    t = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert abs(loss.item() - (0.25 / (t**2 + 0.25 * (1 - t) ** 2)).mean().item()) < 0.01
    assert network.factor.grad.abs() < 0.02


@pytest.mark.parametrize(
    ("path", "prediction"),
    [(RectifiedFlow(), "velocity"), (RectifiedFlow(), "edm"), (TrigFlow(), "edm"), (VarianceExploding(), "edm"), (TrigFlow(), "v")],
)
def test_loss_falls_with_every_well_conditioned_pair(path: Path, prediction: str) -> None:
    assert fall_of(FlowMatching(times=LogNormal()), path, prediction) < 0.8


def test_loss_of_a_batch_is_the_mean_of_its_parts() -> None:
    nets = nets_with(TinyNetwork(), RectifiedFlow(), "velocity")
    method = FlowMatching()
    whole = method.loss(nets, batch_of(64), noise_of(64))
    parts = [method.loss(nets, batch_of(32, start), noise_of(32, start)) for start in (0, 32)]
    torch.testing.assert_close(whole.value, (parts[0].value + parts[1].value) / 2)
    for name, value in whole.logs.items():
        torch.testing.assert_close(value, (parts[0].logs[name] + parts[1].logs[name]) / 2)
    torch.testing.assert_close(sum(whole.logs.values()), whole.value.detach())


def test_update_trains_the_model_only_and_leaves_its_inputs_alone() -> None:
    network, batch = TinyNetwork(), batch_of(16)
    before, weights = copy.deepcopy(batch), copy.deepcopy(network.state_dict())
    (update,) = FlowMatching().updates(Clock(0, 16, 160))
    assert update.role == FlowMatching.generator == "model" and FlowMatching.roles["model"].ema
    update.losses[0](nets_with(network, RectifiedFlow(), "velocity"), batch, noise_of(16)).value.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())
    assert all(torch.equal(batch[key], before[key]) for key in batch)
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())


def test_ends_of_the_path_give_a_finite_loss() -> None:
    class Ends(Uniform):
        def sample(self, uniform: torch.Tensor, path: Path) -> torch.Tensor:
            return torch.where(uniform < 0.5, path.t_min, path.t_max)

    for path in (RectifiedFlow(), TrigFlow(), VarianceExploding(), VariancePreserving()):
        for prediction in ("x0", "eps", "v", "velocity", "edm"):
            loss = FlowMatching(times=Ends()).loss(nets_with(TinyNetwork(), path, prediction), batch_of(8), noise_of(8)).value
            assert loss.isfinite(), (path, prediction)


def test_is_configured_by_name_with_its_own_defaults() -> None:
    assert build(Method, Document({"name": "flow_matching"}, "x.yaml")) == FlowMatching(times=LogitNormal(), label_dropout=0.1)
    method = build(Method, Document({"name": "flow_matching", "times": {"name": "log_normal", "mean": -1}}, "x.yaml"))
    assert method.times == LogNormal(mean=-1.0)
