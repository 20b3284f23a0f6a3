import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gentrain.config import ConfigError, Document, build
from gentrain.methods.base import Clock, Method
from gentrain.methods.consistency import derivative_along
from gentrain.methods.continuous_consistency import ContinuousConsistency, noise_ratios, normalised, tangent
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.models.loss_weight import LossWeight, LossWeightNetwork
from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.trigflow import TrigFlow
from gentrain.training.activations import measure
from gentrain.training.compatibility import warn_of_fast_times
from gentrain.training.roles import Roles
from gentrain.training.run import parse_run
from gentrain.training.world import World
from tests.methods.few_step import gradients_hold_calls_fixed
from tests.methods.toy import TinyNetwork, batch_of, noise_of
from tests.samplers.toy import GaussianNetwork

TRIG = TrigFlow()


def test_the_tangent_is_cos_t_times_the_derivative_of_the_consistency_function() -> None:
    """Against the central difference of f = cos t x - sin t V along the flow, in float64."""
    network = TinyNetwork().double()
    denoiser, x = Denoiser(network, TRIG, "velocity"), noise_of(6).normal((6, 2), torch.float64)
    t, v = torch.linspace(0.2, 1.4, 6, dtype=torch.float64), noise_of(6, 6).normal((6, 2), torch.float64)
    output, derivative = denoiser.velocity(x, t).detach(), derivative_along(denoiser.velocity, x, t, v, torch.ones_like(t), "jvp", 0.0)
    h = 1e-5
    with torch.no_grad():
        change = (denoiser.x0(x + h * v, t + h) - denoiser.x0(x - h * v, t - h)) / (2 * h)
    torch.testing.assert_close(tangent(x, t, output, v, derivative, 1.0), t.cos()[:, None] * change, rtol=1e-5, atol=1e-6)
    stable = -(t.cos()[:, None] ** 2) * (output - v)
    torch.testing.assert_close(tangent(x, t, output, v, derivative, 0.0), stable)
    half = tangent(x, t, output, v, derivative, 0.5)
    torch.testing.assert_close(half, (stable + t.cos()[:, None] * change) / 2, rtol=1e-5, atol=1e-6)


def test_normalisation_is_of_each_row_and_independent_of_its_size() -> None:
    g = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert normalised(g, 0.1)[0].tolist() == pytest.approx([3 / 2.6, 4 / 2.6, 0, 0])
    assert torch.equal(normalised(g, 0.1)[1], g[1])
    torch.testing.assert_close(normalised(g.repeat(1, 3), 0.1), normalised(g, 0.1).repeat(1, 3))


def test_times_are_log_normal_in_the_noise_ratio() -> None:
    count = 100_000
    ratio = noise_ratios(noise_of(count).uniform((count,)), -1.0, 1.4)
    assert abs(ratio.log().mean() + 1.0) < 0.02 and abs(ratio.log().std() - 1.4) < 0.02
    assert noise_ratios(torch.tensor([0.0]), -1.0, 1.4).item() == pytest.approx(math.exp(-8))


def nets_of(student: nn.Module, path: Path = TRIG, prediction: Any = "velocity", teacher: Any = None) -> SimpleNamespace:
    weighting = LossWeightNetwork().requires_grad_(False)
    own = Denoiser(TinyNetwork(), path, prediction)
    return SimpleNamespace(student=Denoiser(student, path, prediction), teacher=teacher or own, weighting=weighting)


def losses_of(method: ContinuousConsistency, nets: SimpleNamespace, batch: dict[str, Tensor], blend: float = 1.0) -> Any:
    return method.loss(blend, [], nets, batch, noise_of(len(batch["x"])))


@pytest.mark.parametrize("source", ["teacher", "data"])
@pytest.mark.parametrize("derivative", ["jvp", "difference"])
def test_what_is_held_fixed(source: Any, derivative: Any) -> None:
    """The derivative of the student along the flow."""
    method = ContinuousConsistency(source=source, derivative=derivative)

    def loss(module: nn.Module) -> Tensor:
        return losses_of(method, nets_of(module), batch_of(64)).value

    frozen = (0,) if derivative == "jvp" else (0, 1)
    assert gradients_hold_calls_fixed(loss, TinyNetwork(), frozen) == len(frozen) + 1


def test_the_gradient_is_that_of_minus_twice_the_tangent_times_the_output() -> None:
    """V and the tangent inside the square are held fixed: d/dV |V - sg V - g|^2 = -2 g."""
    network, rows = TinyNetwork(), 64
    method, batch, nets = ContinuousConsistency(source="data"), batch_of(rows), nets_of(network)
    losses_of(method, nets, batch).value.backward()
    found = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    noise = noise_of(rows)
    t = (noise_ratios(noise.uniform((rows,)), method.mean, method.std) / TRIG.sigma_data).atan()
    eps, condition = noise.normal((rows, 2)), {"label": batch["label"]}
    x, v = TRIG.perturb(batch["x"], eps, t), TRIG.velocity(batch["x"], eps, t)
    student = nets.student
    derivative = derivative_along(lambda a, b: student.velocity(a, b, condition), x, t, v, torch.ones_like(t), "jvp", 0.0)
    output = student.velocity(x, t, condition)
    g = normalised(tangent(x, t, output, v, derivative, 1.0), method.normalisation).detach()
    (-2 * g * output / TRIG.sigma_data).mean().backward()
    for a, p in zip(found, [p for p in network.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-5)


class Exact(nn.Module):
    """The consistency function of the Gaussian of GaussianNetwork, off by (factor - 1) sin t of itself, as velocity on TrigFlow."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        t = (t * math.pi / 2000)[:, None]
        mean, std = GaussianNetwork.mean, GaussianNetwork.deviation
        deviation = (t.cos() ** 2 * std**2 + (0.5 * t.sin()) ** 2).sqrt()
        x0 = (1 + (self.factor - 1) * t.sin()) * (mean + (x - t.cos() * mean) * std / deviation)
        return (t.cos() * x - x0) / t.sin()


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
def test_the_exact_function_is_not_moved_and_others_are_moved_towards_it(derivative: Any) -> None:
    student, count = Exact(), 4000
    batch = {"x": GaussianNetwork.mean + GaussianNetwork.deviation * noise_of(count, count).normal((count, 2), torch.float64)}
    method = ContinuousConsistency(derivative=derivative, step=1e-3)
    found = []
    for factor in (1.0, 0.8, 1.2):
        with torch.no_grad():
            student.factor.fill_(factor)
        student.zero_grad()
        loss = losses_of(method, nets_of(student, teacher=GaussianNetwork(TRIG).denoiser()), batch)
        loss.value.backward()
        assert student.factor.grad is not None
        found.append((loss.logs["error"].item(), student.factor.grad.item()))
    (error, gradient), (_, low), (_, high) = found
    assert error < 1e-4 and abs(gradient) < 1e-3
    assert low < -0.02 and high > 0.02, found


def test_a_difference_stays_on_the_path() -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        seen.append(t * math.pi / 2000)
        return x

    method, denoiser = ContinuousConsistency(derivative="difference", step=0.1, std=10.0), Denoiser(network, TRIG, "velocity")
    nets = SimpleNamespace(student=denoiser, teacher=denoiser, weighting=LossWeightNetwork())
    losses_of(method, nets, batch_of(200))
    times = torch.cat(seen)
    assert times.min() == pytest.approx(0.1, abs=1e-4) and times.max() == pytest.approx(math.pi / 2 - 0.1, abs=1e-4)


def test_networks_of_other_paths_are_read_on_trigflow() -> None:
    """The loss of one function is the same whatever path it was written on."""
    count = 256
    batch = {"x": batch_of(count)["x"].double()}
    values = []
    for path in (TrigFlow(), RectifiedFlow()):
        exact = GaussianNetwork(path)
        nets = SimpleNamespace(student=exact.denoiser(), teacher=exact.denoiser(), weighting=LossWeightNetwork())
        values.append(losses_of(ContinuousConsistency(), nets, batch).logs["error"].item())
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_warm_up_and_order_of_updates() -> None:
    method = ContinuousConsistency(warmup=0.5)
    for samples, blend in ((0, 0.0), (20, 0.4), (50, 1.0), (90, 1.0)):
        student, weighting = method.updates(Clock(samples, 10, 100))
        assert (student.role, weighting.role) == ("student", "weighting")
        assert student.losses[0].args[0] == pytest.approx(blend)  # type: ignore[attr-defined]
    assert next(iter(ContinuousConsistency(warmup=0).updates(Clock(0, 10, 100)))).losses[0].args[0] == 1.0  # type: ignore[attr-defined]


def test_the_weighting_learns_minus_the_logarithm_of_the_error() -> None:
    network = LossWeight().build((2,), 0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    t = torch.linspace(0.1, 1.4, 200)
    error = (3 * t).exp()
    nets = SimpleNamespace(weighting=network)
    for _ in range(300):
        optimizer.zero_grad()
        ContinuousConsistency().weighting_loss([(t, error)], nets, {"x": torch.zeros(200, 2)}, noise_of(200)).value.backward()  # type: ignore[arg-type]
        optimizer.step()
    assert (network(t[:, None], TRIG.network_time(t)) + 3 * t).abs().max() < 0.25


def test_the_weight_multiplies_the_students_error_and_errors_pass_from_loss_to_loss() -> None:
    method, nets, batch = ContinuousConsistency(), nets_of(TinyNetwork()), batch_of(32)
    errors: list[tuple[Tensor, Tensor]] = []
    first = method.loss(1.0, errors, nets, batch, noise_of(32))
    assert first.value.item() == pytest.approx(first.logs["error"].item())  # weight 1 at first
    assert len(errors) == 1 and not errors[0][1].requires_grad
    assert errors[0][1].mean().item() == pytest.approx(first.logs["error"].item())
    assert method.weighting_loss(errors, nets, batch, noise_of(32)).value.item() == pytest.approx(first.logs["error"].item(), rel=1e-5)
    assert errors == []
    nets.weighting.output.weight.data.fill_(0.01)
    assert losses_of(method, nets, batch).value.item() != pytest.approx(first.value.item(), rel=1e-3)


def test_roles_and_mistakes() -> None:
    assert list(ContinuousConsistency().roles) == ["teacher", "student", "weighting"]
    assert list(ContinuousConsistency(source="data").roles) == ["student", "weighting"]
    with pytest.raises(ConfigError, match="guidance needs a teacher"):
        build(Method, Document({"name": "continuous_consistency", "source": "data", "guidance": 2}, "x.yaml"))
    with pytest.raises(ConfigError, match=r"step 0\.4 leaves no times between the path's ends; set it below 0\.39"):
        build(Method, Document({"name": "continuous_consistency", "derivative": "difference", "step": 0.4}, "x.yaml"))
    with pytest.raises(ConfigError, match="step 1e-06 is lost in the rounding of float32; set it to 1e-5 or more"):
        build(Method, Document({"name": "continuous_consistency", "step": 1e-6}, "x.yaml"))
    settings: dict[str, Any] = {
        "method": {"name": "continuous_consistency", "source": "data"}, "data": "rings", "model": "mlp", "training": {"samples": 10},
        "engine": {"name": "deepspeed", "zero_stage": 3},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"role 'student' do not pass through ZeRO stage 3"):
        parse_run(Document(settings, "x.yaml"))
    settings["method"]["derivative"] = "difference"
    parse_run(Document(settings, "x.yaml"))


def test_a_derivative_through_a_fast_time_embedding_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {
        "method": {"name": "continuous_consistency", "source": "data"}, "data": "rings", "model": "mlp", "training": {"samples": 10},
        "engine": "torch",
    }  # fmt: skip
    run = parse_run(Document(settings, "x.yaml"))
    assert caplog.text == ""  # a run that is opened to be drawn from
    for begin in (lambda: measure(run, 4), lambda: Roles(run, World(0, 1, torch.device("cpu")))):
        begin()
        assert "model.time_scale: 0.01" in caplog.text
        caplog.clear()
    warn_of_fast_times(parse_run(Document(settings | {"model": {"name": "mlp", "time_scale": 0.01}}, "x.yaml")))
    assert caplog.text == ""


def test_the_network_that_the_method_brings_is_no_other() -> None:
    settings: dict[str, Any] = {
        "method": {"name": "continuous_consistency", "source": "data"}, "data": "rings", "model": "mlp", "training": {"samples": 10},
        "roles": {"weighting": {"model": "loss_weight"}},
    }  # fmt: skip
    parse_run(Document(settings, "x.yaml"))
    with pytest.raises(ConfigError, match=r"roles\.weighting\.model: the method brings a network of its own, loss_weight; leave it out"):
        parse_run(Document(settings | {"roles": {"weighting": {"model": "mlp"}}}, "x.yaml"))
