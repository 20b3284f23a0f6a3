from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gentrain.config import ConfigError, Document, build
from gentrain.methods.base import Method
from gentrain.methods.mean_flow import MeanFlow, adaptive_loss, mean_flow_target
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.trigflow import TrigFlow
from gentrain.samplers.consistency import Consistency
from gentrain.samplers.euler import Euler
from gentrain.samplers.few_step import FewStep
from gentrain.samplers.flow_map import FlowMap
from gentrain.samplers.lcm import LCM
from gentrain.samplers.one_step import OneStep
from gentrain.training.run import parse_run
from tests.methods.few_step import gradients_hold_calls_fixed
from tests.methods.toy import TinyNetwork, batch_of, nets_with, noise_of

PATH, STD = RectifiedFlow(), 0.5


def test_the_target_and_the_loss_by_their_formulas() -> None:
    v, derivative = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, -4.0]])
    assert mean_flow_target(v, derivative, torch.tensor([0.5])).tolist() == [[1 - 5.0, 2 + 2.0]]
    error = torch.tensor([[3.0, 4.0]], requires_grad=True)
    loss = adaptive_loss(error, 1.0, 1e-3)
    assert loss.item() == pytest.approx(25 / 25.001)
    loss.sum().backward()
    assert error.grad is not None  # the weight is held fixed: without it the gradient would be next to nothing
    assert error.grad[0].tolist() == pytest.approx([6 / 25.001, 8 / 25.001])
    assert adaptive_loss(error, 0.0, 1e-3).item() == 25


def slope(t: Tensor) -> Tensor:
    """Of the Gaussian's flow: x_t = slope(t) / slope(s) x_s."""
    return ((1 - t) ** 2 * STD**2 + t**2).sqrt()


class Gaussian(nn.Module):
    """The mean velocity (x_t - x_r) / (t - r) of the flow of N(0, STD^2), times a factor, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        t, r = t / 1000, (condition or {}).get("end", t) / 1000
        length = (t - r).clamp(min=1e-6)
        mean = x * ((1 - slope(t - length) / slope(t)) / length)[:, None]
        now = x * ((t - (1 - t) * STD**2) / slope(t) ** 2)[:, None]
        return self.factor * torch.where((t - r > 1e-6)[:, None], mean, now)


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
def test_the_identity_holds_for_the_exact_mean_velocity(derivative: Any) -> None:
    """With the flow's own velocity the target is the mean velocity itself; with data in its place, in the mean over them."""
    count = 20_000
    batch = {"x": STD * noise_of(count, count).normal((count, 1), torch.float64)}
    network = Gaussian()
    method = MeanFlow(derivative=derivative, power=0.0, equal=0.25)
    gradients = []
    for factor in (1.0, 0.9, 1.1):
        network.zero_grad()
        with torch.no_grad():
            network.factor.fill_(factor)
        method.loss(nets_with(network, PATH, "velocity"), batch, noise_of(count)).value.backward()
        assert network.factor.grad is not None
        gradients.append(network.factor.grad.item())
    assert abs(gradients[0]) < 0.02 and gradients[1] < -0.05 and gradients[2] > 0.05  # -0.0075, -0.085, 0.070


def test_both_derivatives_give_one_loss() -> None:
    network, batch = TinyNetwork(), batch_of(64)
    batch["x"] = batch["x"].double()
    losses = [
        MeanFlow(derivative=how, step=1e-3, equal=0.0).loss(nets_with(network.double(), PATH, "velocity"), batch, noise_of(64)).value.item()  # type: ignore[arg-type]
        for how in ("jvp", "difference")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("mixing, calls", [(0.0, (0,)), (0.5, (0, 1))])
def test_what_is_held_fixed(mixing: float, calls: tuple[int, ...]) -> None:
    method = MeanFlow(mixing=mixing, guidance=2.0 if mixing else 1.0)

    def loss(module: nn.Module) -> Tensor:
        return method.loss(nets_with(module, PATH, "velocity"), batch_of(64), noise_of(64)).value

    assert gradients_hold_calls_fixed(loss, TinyNetwork(), frozen=calls) == len(calls) + 1


def test_times_and_the_end_the_network_reads() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, t: Tensor, condition: dict) -> Tensor:
        seen.append((t, condition["end"]))
        return x

    count = 4000
    MeanFlow(derivative="difference").loss(nets_with(network, PATH, "velocity"), batch_of(count), noise_of(count))  # type: ignore[arg-type]
    t, end = seen[-1]
    assert (end <= t).all() and (t <= 1000).all()
    assert abs((end == t).float().mean() - 0.75) < 0.03
    ahead, behind = seen[0][0], seen[1][0]
    torch.testing.assert_close(ahead - behind, torch.full_like(t, 10.0), rtol=1e-2, atol=1e-2)  # t moves, r does not
    assert all(torch.equal(other, end) for _, other in seen)


def test_the_guided_velocity() -> None:
    """omega v + kappa u_c + (1 - omega - kappa) u_null with u_c = 3 and u_null = 1, omega = w (1 - kappa); v where labels are dropped."""

    def network(x: Tensor, t: Tensor, condition: dict) -> Tensor:
        return torch.where(condition["label"] < 0, 1.0, 3.0)[:, None].expand_as(x)

    x, t, label = torch.zeros(4, 2), torch.full((4,), 0.5), {"label": torch.zeros(4, dtype=torch.int64)}
    dropped = torch.tensor([False, True, False, True])
    method = MeanFlow(guidance=2.0, mixing=0.25)
    found = method._guided(Denoiser(network, PATH, "velocity"), x, t, label, torch.full((4, 2), 10.0), dropped)
    omega = 2.0 * 0.75
    assert found[:, 0].tolist() == pytest.approx(
        [omega * 10 + 0.25 * 3 + (1 - omega - 0.25) * 1, 10, omega * 10 + 0.25 * 3 + (1 - omega - 0.25), 10]
    )


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_sampler_is_exact_with_the_exact_map_in_any_number_of_steps(steps: int) -> None:
    denoiser, z = Denoiser(Gaussian(), PATH, "velocity"), noise_of(100).normal((100, 1), torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(FlowMap(steps=steps).solve(denoiser, z, noise_of(100)), STD * z)
        # without `end` the same network is the velocity: ordinary samplers work
        many = Euler(steps=400).solve(denoiser, z, noise_of(100))
    assert (many - STD * z).abs().max() < 0.01


def test_mistakes_are_told_as_the_configuration_loads() -> None:
    method = build(Method, Document({"name": "mean_flow"}, "x.yaml"))
    with pytest.raises(ValueError, match="needs the path rectified_flow, not trigflow"):
        method.check(TrigFlow())
    for settings, message in (
        ({"mixing": 1}, "mixing 1 leaves nothing"),
        ({"guidance": 2, "label_dropout": 0}, "the null class, which label_dropout 0 does not train"),
        ({"step": 0.5}, "step 0.5 reaches over the whole path"),
        ({"step": 1e-6}, "step 1e-06 is lost in the rounding of float32"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(Method, Document({"name": "mean_flow", **settings}, "x.yaml"))
    MeanFlow().check_sampler(Euler())
    for sampler in (Consistency(), LCM(), OneStep(), FewStep()):
        with pytest.raises(ValueError, match=f"{sampler.registered_name} takes the x0 of a velocity for data; take flow_map"):
            MeanFlow().check_sampler(sampler)
    MeanFlow().check_sampler(FlowMap(guidance=3))
    MeanFlow(guidance=2).check_sampler(FlowMap())
    with pytest.raises(ValueError, match="guidance 2 is learnt, and 3 would come on top; set sampler"):
        MeanFlow(guidance=2).check_sampler(FlowMap(guidance=3))
    settings: dict[str, Any] = {
        "method": "mean_flow",
        "data": "rings",
        "model": "mlp",
        "training": {"samples": 10},
        "engine": {"name": "deepspeed", "zero_stage": 3},
    }
    with pytest.raises(ConfigError, match=r"engine\.zero_stage: forward-mode derivatives of role 'model' do not pass through ZeRO stage 3"):
        parse_run(Document(settings, "x.yaml"))
    parse_run(Document({**settings, "method": {"name": "mean_flow", "derivative": "difference"}}, "x.yaml"))
