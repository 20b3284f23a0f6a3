"""What few-step methods share, against formulas written down independently in float64."""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gentrain.config import ConfigError, Document, build
from gentrain.data.toys import Rings
from gentrain.methods.base import Method
from gentrain.methods.consistency import (
    boundary_scalings,
    derivative_along,
    doubling_intervals,
    flow_map,
    guidance_embedding,
    guided_velocity,
    lcm_timesteps,
    noise_ratio,
    pseudo_huber,
    row_huber,
    row_square,
    same_dropout,
    time_of_ratio,
)
from gentrain.methods.consistency_distillation import ConsistencyDistillation
from gentrain.methods.consistency_training import ConsistencyTraining
from gentrain.methods.continuous_consistency import ContinuousConsistency
from gentrain.methods.easy_consistency_tuning import EasyConsistencyTuning
from gentrain.methods.latent_consistency import LatentConsistency
from gentrain.methods.mean_flow import MeanFlow
from gentrain.models.base import Condition, Model
from gentrain.models.denoiser import Denoiser
from gentrain.models.dit import DiT
from gentrain.models.inputs import WIDTH, Inputs
from gentrain.models.loss_weight import LossWeightNetwork
from gentrain.models.mlp import MLP
from gentrain.models.reading import read_on
from gentrain.models.unet import UNet
from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.trigflow import TrigFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.base import Sampler
from gentrain.samplers.consistency import Consistency
from gentrain.samplers.flow_map import FlowMap
from gentrain.samplers.lcm import stable_diffusion_grid
from tests.methods.toy import TinyNetwork, batch_of, noise_of
from tests.samplers.toy import GaussianNetwork

PATHS: list[Path] = [RectifiedFlow(), TrigFlow(), VariancePreserving(), VarianceExploding()]


def test_boundary_scalings_at_known_timesteps() -> None:
    skip, out = boundary_scalings(torch.tensor([0, 1, 19], dtype=torch.float64))
    assert skip.tolist() == pytest.approx([1.0, 2.494e-3, 6.93e-6], rel=1e-3)
    assert out[:2].tolist() == pytest.approx([0.0, 0.998752], rel=1e-6)
    for t in (
        0.0,
        0.3,
        7.0,
    ):  # with other numbers, and single: s t / sqrt((s t)^2 + d^2) is the sine of the angle whose cosine squared is c_skip
        angle = math.atan2(3 * t, 0.7)
        found = boundary_scalings(torch.tensor(t), sigma_data=0.7, timestep_scaling=3.0)
        assert [v.item() for v in found] == pytest.approx([math.cos(angle) ** 2, math.sin(angle)], abs=1e-6)
    assert boundary_scalings(torch.tensor([3]))[0].dtype == torch.float32


def test_the_guidance_embedding_by_its_definition() -> None:
    w, dim = torch.tensor([0.0, 7.5, 14.0], dtype=torch.float64), 256
    found = guidance_embedding(w, dim)
    for row, value in enumerate(w.tolist()):
        phases = [1000 * value * 10_000 ** (-j / (dim / 2 - 1)) for j in range(dim // 2)]
        expected = [math.sin(p) for p in phases] + [math.cos(p) for p in phases]
        assert found[row].tolist() == pytest.approx(expected, abs=1e-9)
    assert guidance_embedding(w.bfloat16(), 8).dtype == torch.float32
    # in float32 the phases, up to 1.4e4 rad, are off by a thousandth; in bfloat16 they would be garbage
    assert (guidance_embedding(w.float(), dim) - found).abs().max() < 2e-3
    with pytest.raises(ValueError, match="dim must be even"):
        guidance_embedding(w, 7)


def test_pseudo_huber_is_elementwise_and_exact_in_half_precision() -> None:
    a, b = torch.tensor([[3.0, 0.0, 1e-3]]), torch.zeros(1, 3)
    c = 1e-3
    assert pseudo_huber(a, b, c)[0].tolist() == pytest.approx([math.sqrt(9 + c * c) - c, 0.0, c * (math.sqrt(2) - 1)], rel=1e-5)
    assert pseudo_huber(a.bfloat16(), b.bfloat16(), c)[0, 2] > 0.3 * c
    assert pseudo_huber(a, b, c).tolist() == pseudo_huber(b, a, c).tolist()


def test_row_huber_is_the_norm_of_a_row_that_is_smooth_at_zero() -> None:
    values = row_huber(torch.tensor([[[3.0], [4.0]], [[0.0], [0.0]]]), torch.zeros(2, 2, 1))
    c = 0.00054 * 2**0.5
    assert values.tolist() == pytest.approx([math.sqrt(25 + c**2) - c, 0.0])


def test_row_square_is_the_squared_norm_of_a_row() -> None:
    assert row_square(torch.tensor([[[3.0], [4.0]], [[0.0], [1.0]]]), torch.zeros(2, 2, 1)).tolist() == [25.0, 1.0]


def test_lcm_timesteps_are_those_of_the_code_release() -> None:
    assert lcm_timesteps(50, 20).tolist() == list(range(19, 1000, 20))
    assert lcm_timesteps(3, 10).dtype == torch.int64


def test_intervals_double_in_equal_parts_of_the_run() -> None:
    total = 800
    part = total // (math.floor(math.log2(1280 // 10)) + 1)  # K' of arXiv:2310.14189
    for step in range(total):
        assert doubling_intervals(step / total, 10, 1280) == min(10 * 2 ** (step // part), 1280)
    assert doubling_intervals(1.0, 10, 1280) == 1280
    assert [doubling_intervals(p, 7, 7) for p in (0.0, 0.99)] == [7, 7]


@pytest.mark.parametrize("path", PATHS)
def test_noise_ratios_and_times_are_inverse(path: Path) -> None:
    t = torch.linspace(path.t_min, path.t_max, 9, dtype=torch.float64)[1:-1]
    torch.testing.assert_close(noise_ratio(path, t), path.sigma(t) / path.alpha(t))
    torch.testing.assert_close(time_of_ratio(path, noise_ratio(path, t)), t)
    assert time_of_ratio(path, torch.zeros(1)).item() == pytest.approx(path.t_min, abs=1e-6)


def test_two_calls_drop_the_same_units() -> None:
    x, dropout = torch.ones(64, 8), torch.nn.Dropout(0.5)
    with same_dropout(x):
        first = dropout(x)
    assert torch.equal(first, dropout(x)) and not torch.equal(first, dropout(x))


class Dropping(nn.Module):
    """Remembers which units each of its calls dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.dropped = nn.Parameter(torch.ones(())), []  # type: ignore[var-annotated]

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        kept = torch.nn.functional.dropout(torch.ones_like(x), 0.5)
        self.dropped.append(kept)
        return self.weight * x * kept


@pytest.mark.parametrize("loss", [
    ConsistencyDistillation().loss, LatentConsistency(guidance=(1.0, 1.0)).loss, partial(ConsistencyTraining().loss, 20),
    partial(EasyConsistencyTuning().loss, 0.5), MeanFlow(derivative="difference").loss,
    partial(ContinuousConsistency(source="data", derivative="difference").loss, 1.0, []),
])  # fmt: skip
def test_the_student_and_its_target_drop_the_same_units(loss: Any) -> None:
    network, path = Dropping(), RectifiedFlow()
    own = Denoiser(network, path, "velocity")
    teacher, weighting = Denoiser(TinyNetwork(), path, "velocity"), LossWeightNetwork()
    nets = SimpleNamespace(model=own, student=own, target=own, teacher=teacher, weighting=weighting)
    loss(nets, batch_of(64), noise_of(64))
    *targets, student = network.dropped
    assert targets and all(torch.equal(target, student) for target in targets) and 0 < student.mean() < 2


def test_both_sides_of_a_difference_drop_the_same_units() -> None:
    network, x, t = Dropping(), torch.randn(64, 2), torch.full((64,), 0.5)
    derivative_along(network, x, t, x, t, "difference", 1e-3)
    assert torch.equal(*network.dropped)


@pytest.mark.parametrize("how, tolerance", [("jvp", 1e-12), ("difference", 1e-6)])
def test_the_derivative_along_a_direction_by_hand(how: str, tolerance: float) -> None:
    x = noise_of(5).normal((5, 3), torch.float64)
    t, dx, dt = x[:, 0].abs(), x.flip(1), torch.linspace(1, 2, 5, dtype=torch.float64)

    def function(x: Tensor, t: Tensor) -> Tensor:
        return x.sin() * t[:, None] ** 3

    found = derivative_along(function, x, t, dx, dt, how, 1e-4)  # type: ignore[arg-type]
    expected = x.cos() * dx * t[:, None] ** 3 + x.sin() * (3 * t**2 * dt)[:, None]
    assert ((found - expected).abs() / (1 + expected.abs())).max() < tolerance
    assert not found.requires_grad


@pytest.mark.parametrize(
    "model, shape", [(MLP(), (2,)), (UNet(channels=(16, 32), attention_head_dim=8), (1, 8, 8)), (DiT(layers=1), (1, 8, 8))]
)
def test_every_network_has_a_forward_derivative(model: Model, shape: tuple[int, ...]) -> None:
    """UNets need contiguous input of group normalisation, attention needs its plain formula."""
    torch.manual_seed(0)
    network = model.build(shape, 3).double()
    network.add_inputs(("end",))
    for p in network.double().parameters():
        torch.nn.init.normal_(p, std=0.1)  # zero layers would hide what is behind them
    x, dx = (noise_of(4, start).normal((4, *shape), torch.float64) for start in (0, 4))
    t, dt = torch.linspace(100, 900, 4, dtype=torch.float64), torch.full((4,), 20.0, dtype=torch.float64)
    condition = {"label": torch.tensor([0, 1, 2, -1]), "end": t / 2}

    def function(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t, condition)

    exact, approximate = (derivative_along(function, x, t, dx, dt, how, 1e-3) for how in ("jvp", "difference"))  # type: ignore[arg-type]
    assert exact.abs().max() > 1e-3
    # the embedding of the time is made in float32, which tells 900 +- 0.02 apart to 0.3 %
    assert (exact - approximate).abs().max() / exact.abs().max() < 1e-2


@pytest.mark.parametrize(
    "model, shape", [(MLP(), (2,)), (UNet(channels=(16, 32), attention_head_dim=8), (1, 8, 8)), (DiT(layers=1), (1, 8, 8))]
)
@pytest.mark.parametrize("classes", [0, 3])
def test_inputs_change_nothing_until_they_learn(model: Model, shape: tuple[int, ...], classes: int) -> None:
    if model.registered_name == "dit" and classes == 0:
        pytest.skip("diffusers' DiT has labels")
    torch.manual_seed(0)
    network = model.build(shape, classes)
    x, t = noise_of(3).normal((3, *shape)), torch.tensor([10.0, 500.0, 900.0])
    condition: Condition = {"label": torch.tensor([0, -1, 2])} if classes else {}
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    before, keys = network(x, t, condition), set(network.state_dict())
    network.add_inputs(("guidance", "end", "step"))
    assert set(network.state_dict()) - keys == {f"inputs.projections.{name}.weight" for name in ("guidance", "end", "step")}
    assert keys <= set(network.state_dict())
    given = {**condition, "guidance": torch.tensor([1.0, 2.0, 3.0]), "end": torch.zeros(3), "step": torch.zeros(3)}
    assert torch.equal(network(x, t, given), before)
    torch.nn.init.normal_(network.inputs.projections["guidance"].weight, std=0.1)
    other = network(x, t, given)
    assert (other - before).abs().amax(tuple(range(1, x.ndim))).min() > 1e-4
    assert torch.equal(network(x, t, condition), before)  # absent: nothing is added
    for name in ("end", "step"):
        torch.nn.init.normal_(network.inputs.projections[name].weight, std=0.1)
        assert not torch.equal(network(x, t, given), other)
        assert torch.equal(network(x, t, {**condition, name: t}), network(x, t, condition))  # absent: the velocity itself
        other = network(x, t, given)


@pytest.mark.parametrize("name, turn", [("end", 0.25), ("step", 4.0)])
def test_the_end_of_a_flow_map_is_read_slowly(name: str, turn: float) -> None:
    """A derivative by time passes through its embedding: no part of it turns by more than a quarter of a radian over the path."""
    inputs = Inputs((name,), WIDTH)
    torch.nn.init.eye_(inputs.projections[name].weight)
    with torch.no_grad():
        found = inputs(torch.linspace(0, 1000, 1001), {name: torch.zeros(1001)})
    assert isinstance(found, Tensor) and 1000 * found.diff(dim=0).abs().max().item() == pytest.approx(turn, rel=1e-3)
    assert (found[-1] - found[0])[WIDTH // 2 - 1].item() == pytest.approx(math.sin(turn))


def test_unknown_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown input 'weight'; there are: guidance, end"):
        Inputs(("weight",), 8)


@pytest.mark.parametrize("target", [TrigFlow(), RectifiedFlow(), stable_diffusion_grid()])
@pytest.mark.parametrize("source", [RectifiedFlow(), TrigFlow(), VariancePreserving()])
def test_reading_on_another_path_gives_what_is_exact_there(source: Path, target: Path) -> None:
    """Of Gaussian data every path's exact denoiser is known."""
    t = torch.linspace(target.t_min, target.t_max, 7, dtype=torch.float64)[1:-1]
    x = noise_of(5).normal((5, 2), torch.float64)
    read, exact = read_on(GaussianNetwork(source).denoiser(), target), GaussianNetwork(target).denoiser()
    for name in ("x0", "eps", "velocity"):
        torch.testing.assert_close(getattr(read, name)(x, t, None), getattr(exact, name)(x, t, None), rtol=1e-6, atol=1e-6)


def test_reading_on_the_own_path_is_the_denoiser_itself() -> None:
    denoiser = Denoiser(TinyNetwork(), RectifiedFlow(), "velocity")
    assert read_on(denoiser, RectifiedFlow()) is denoiser


@pytest.mark.parametrize("path", [RectifiedFlow(), TrigFlow(), VariancePreserving()])
def test_a_flow_map_to_the_end_is_the_x0_prediction(path: Path) -> None:
    """One interface for all members: f(x_t, t -> 0) of a network that takes no end."""
    denoiser, x = Denoiser(TinyNetwork(), path, "v"), noise_of(4).normal((4, 2))
    t, s = torch.full((4,), 0.6 * path.t_max), torch.full((4,), path.t_min)
    labels = {"label": torch.tensor([0, 1, 2, -1])}
    found = flow_map(denoiser, x, t, s, labels)
    expected = path.perturb(denoiser.x0(x, t, labels), denoiser.eps(x, t, labels), s)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", [Consistency(guidance=3.0), FlowMap(guidance=3.0)])
def test_samplers_guide_where_asked(sampler: Sampler) -> None:
    """A velocity of 1 given a label and of 2 without, guided by 3 to -1: from 0 at t = 1 to 1."""

    def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.where(condition["label"] < 0, 2.0, 1.0)[:, None].expand_as(x)

    denoiser, labels = Denoiser(network, RectifiedFlow(), "velocity"), {"label": torch.zeros(4, dtype=torch.int64)}
    torch.testing.assert_close(sampler.solve(denoiser, torch.zeros(4, 2), noise_of(4), labels), torch.ones(4, 2))


def test_a_flow_map_tells_the_network_where_it_ends() -> None:
    seen = []

    def network(x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        assert condition is not None
        seen.append(condition["end"])
        return torch.ones_like(x)

    x = torch.zeros(2, 2)
    moved = flow_map(Denoiser(network, RectifiedFlow(), "velocity"), x, torch.tensor([1.0, 0.8]), torch.tensor([0.5, 0.2]))
    assert seen[0].tolist() == pytest.approx([500.0, 200.0])
    assert moved[:, 0].tolist() == pytest.approx([-0.5, -0.6])


@pytest.mark.parametrize("method, key, value, without", [
    ("consistency_distillation", "guidance", 2, 1), ("latent_consistency", "guidance", [1, 3], 1),
    ("continuous_consistency", "guidance", 2, 1), ("mean_flow", "guidance", 2, 1), ("mean_flow", "mixing", 0.5, 0),
])  # fmt: skip
def test_guidance_without_anything_to_guide_by_is_refused(method: str, key: str, value: Any, without: int) -> None:
    made = build(Method, Document({"name": method, key: value}, "x.yaml"))
    with pytest.raises(ConfigError, match=rf"{key}: the data have neither classes nor captions to guide by; set it to {without}"):
        made.check_data(SimpleNamespace(class_names=(), captions=()))  # type: ignore[arg-type]
    made.check_data(Rings())


@pytest.mark.parametrize("path", [RectifiedFlow(), TrigFlow()])
def test_a_guided_velocity_is_the_denoisers_without_guidance(path: Path) -> None:
    network = TinyNetwork()
    denoiser, x, t = Denoiser(network, path, "velocity"), noise_of(4).normal((4, 2)), torch.tensor([0.2, 0.5, 0.7, 0.9])
    labels = {"label": torch.tensor([0, 1, 2, 0])}
    torch.testing.assert_close(guided_velocity(denoiser, x, t, labels, 1.0), denoiser.velocity(x, t, labels), rtol=1e-4, atol=1e-5)
    given, free = denoiser.velocity(x, t, labels), denoiser.velocity(x, t, None)
    torch.testing.assert_close(guided_velocity(denoiser, x, t, labels, 3.0), free + 3 * (given - free), rtol=1e-4, atol=1e-5)
