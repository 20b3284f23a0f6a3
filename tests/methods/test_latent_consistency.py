from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gentrain.config import ConfigError, Document, build
from gentrain.methods.base import Clock, Follow, Method
from gentrain.methods.latent_consistency import LatentConsistency, Taught, augmented_x0, solve
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path, convert_time
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.trigflow import TrigFlow
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.consistency import Consistency
from gentrain.samplers.lcm import LCM, stable_diffusion_grid
from gentrain.training.roles import build_network
from gentrain.training.run import parse_run
from tests.distributed import cases  # noqa: F401  # registers dropout_mlp
from tests.methods.few_step import gradients_hold_calls_fixed
from tests.methods.toy import TinyNetwork, batch_of, noise_of

GRID = stable_diffusion_grid()
STD = 1.2  # of the Gaussian data


class Labelled(nn.Module):
    """Nonlinear, in float64, with labels."""

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        label = torch.full((len(x),), -1) if condition is None else condition["label"]
        return torch.tanh(x * (1 + 0.1 * label)[:, None]) + 0.2 * (t / 500).sin()[:, None]


def points(count: int = 6) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return (
        noise_of(count).normal((count, 2), torch.float64),
        torch.full((count,), 599.0, dtype=torch.float64),
        {"label": torch.arange(count) % 3},
    )


def test_guided_ddim_is_one_plus_w_steps_of_the_conditional_less_w_of_the_null() -> None:
    x, t, condition = points()
    s, w, network = t - 20, torch.linspace(0, 14, 6, dtype=torch.float64), Labelled()
    alpha, sigma = (f(t)[:, None] for f in (GRID.alpha, GRID.sigma))
    alpha_s, sigma_s = (f(s)[:, None] for f in (GRID.alpha, GRID.sigma))

    def step(eps: Tensor) -> Tensor:
        return alpha_s * (x - sigma * eps) / alpha + sigma_s * eps

    expected = (1 + w[:, None]) * step(network(x, t, condition)) - w[:, None] * step(network(x, t, None))
    torch.testing.assert_close(solve("ddim", Denoiser(network, GRID, "eps"), x, t, s, condition, w), expected)


def test_ddim_is_dpm_solver_of_order_one() -> None:
    x, t, condition = points()
    s, w, denoiser = t - 20, torch.zeros(6, dtype=torch.float64), Denoiser(Labelled(), GRID, "eps")
    h = (GRID.log_snr(s) - GRID.log_snr(t)) / 2
    first = (GRID.sigma(s) / GRID.sigma(t))[:, None] * x - (GRID.alpha(s) * torch.expm1(-h))[:, None] * denoiser.x0(x, t, condition)
    assert (solve("ddim", denoiser, x, t, s, condition, w) - first).abs().max() < 1e-12


def test_dpmpp_2s_by_its_algorithm_and_its_order() -> None:
    """Algorithm 1 of arXiv:2211.01095 with r = 1/2, and errors that fall with the cube of the step, DDIM's with the square."""
    x, t, condition = points()
    s, w, denoiser = t - 20, torch.zeros(6, dtype=torch.float64), Denoiser(Labelled(), GRID, "eps")
    lam = GRID.log_snr(t) / 2
    h = GRID.log_snr(s) / 2 - lam
    middle = GRID.time_of_log_snr(2 * (lam + h / 2))
    u = (GRID.sigma(middle) / GRID.sigma(t))[:, None] * x - (GRID.alpha(middle) * torch.expm1(-h / 2))[:, None] * denoiser.x0(
        x, t, condition
    )
    expected = (GRID.sigma(s) / GRID.sigma(t))[:, None] * x - (GRID.alpha(s) * torch.expm1(-h))[:, None] * denoiser.x0(u, middle, condition)
    torch.testing.assert_close(solve("dpmpp_2s", denoiser, x, t, s, condition, w), expected)
    exact = Denoiser(gaussian, GRID, "x0")
    for solver, order in (("ddim", 2), ("dpmpp_2s", 3)):
        errors = []
        for stride in (40.0, 20.0):
            end = t - stride
            found = solve(solver, exact, x, t, end, None, w)  # type: ignore[arg-type]
            errors.append((found - x * (deviation(end) / deviation(t))[:, None]).abs().max().item())
        assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def deviation(t: Tensor) -> Tensor:
    return (GRID.alpha(t) ** 2 * STD**2 + GRID.sigma(t) ** 2).sqrt()


def gaussian(x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
    """Exact x0 of data N(0, STD^2)."""
    return (GRID.alpha(t) * STD**2 / deviation(t) ** 2)[:, None] * x


def test_augmented_prediction() -> None:
    x, t, condition = points()
    w, network = torch.arange(6, dtype=torch.float64), Labelled()
    denoiser = Denoiser(network, GRID, "x0")
    given, free = network(x, t, condition), network(x, t, None)
    torch.testing.assert_close(augmented_x0(denoiser, x, t, condition, w), given + w[:, None] * (given - free))
    torch.testing.assert_close(augmented_x0(denoiser, x, t, None, w), free)


class Table(nn.Module):
    """x0 = slope x, one slope per timestep, from those of the teacher's x0 prediction."""

    def __init__(self) -> None:
        super().__init__()
        t = torch.arange(1000, dtype=torch.float64)
        self.slope = nn.Parameter(GRID.alpha(t) * STD**2 / deviation(t) ** 2)

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return self.slope[t.round().long()][:, None] * x


# multiplier of DDIM over the grid: 1.19862 is the exact flow's
FIXED_POINTS = {20: 1.12778, 50: 1.16924, 100: 1.18372, 200: 1.19113}


@pytest.mark.parametrize("count", FIXED_POINTS)
def test_the_fixed_point_is_the_samplers_of_the_grid(count: int) -> None:
    """Slopes that are products of DDIM's have no loss, those of the exact flow have."""
    stride = 1000 // count
    method = LatentConsistency(guidance=(1.0, 1.0), count=count, stride=stride, distance="l2")
    ends = torch.arange(stride - 1, 1000, stride, dtype=torch.float64)
    starts = torch.cat([torch.zeros(1, dtype=torch.float64), ends[:-1]])
    slopes = []
    for t, s in zip(ends, starts):
        eps = GRID.sigma(t) / deviation(t) ** 2
        slopes.append(GRID.alpha(s) * (1 - GRID.sigma(t) * eps) / GRID.alpha(t) + GRID.sigma(s) * eps)
    table, count_rows = Table(), 4000
    batch = {"x": STD * noise_of(count_rows, 9000).normal((count_rows, 1), torch.float64)}
    nets = SimpleNamespace(**{role: Denoiser(table, GRID, "x0") for role in ("student", "target")}, teacher=Denoiser(gaussian, GRID, "x0"))
    losses = []
    for values in (torch.tensor(slopes).double().cumprod(0), deviation(torch.zeros(1, dtype=torch.float64)) / deviation(ends)):
        with torch.no_grad():
            table.slope[ends.long()] = values
        losses.append(method.loss(nets, batch, noise_of(count_rows)).value.item())
    assert torch.tensor(slopes).double().prod().item() == pytest.approx(FIXED_POINTS[count], abs=5e-6)
    assert (deviation(torch.zeros(1, dtype=torch.float64))[0] / deviation(ends)[-1]).item() == pytest.approx(1.19862, abs=5e-6)
    assert losses[0] < 1e-9 and losses[0] < losses[1] / 30  # what the scalings leave


def learnt_slope(seed: int) -> tuple[float, float]:
    """Slope at t = 999 of a student of a slope per timestep, and the deviation of its one-step samples; the gate has further seeds."""
    method = LatentConsistency(guidance=(1.0, 1.0), distance="l2", target_decay=0.0)
    table, teacher = Table(), Denoiser(gaussian, GRID, "x0")
    nets = SimpleNamespace(**{role: Denoiser(table, GRID, "x0") for role in ("student", "target")}, teacher=teacher)
    optimizer = torch.optim.SGD(table.parameters(), lr=8.0)  # 8 * 2 / 50 of the way for each of 50 slopes in every step
    for step in range(500):
        rows = torch.arange(step * 1024, (step + 1) * 1024)
        batch = {"x": STD * Noise(100 + seed, rows).normal((1024, 1), torch.float64)}
        optimizer.zero_grad()
        method.loss(nets, batch, Noise(seed, rows)).value.backward()
        optimizer.step()
    with torch.no_grad():
        x = LCM(steps=1).sample(Denoiser(table, GRID, "x0"), (20_000, 1), Noise(seed, torch.arange(20_000)))
    return table.slope[999].item(), x.std().item()


def test_a_student_learns_the_slope_of_ddim_50_and_not_of_the_flow() -> None:
    """The specification asks for 0.5 % of 1.16924, and 1 % of the samples' deviation. The flow's slope is 1.19862."""
    slope, std = learnt_slope(0)
    assert slope == pytest.approx(1.16924, rel=1e-4)
    assert std == pytest.approx(1.169, rel=1e-2)


def nets_of(student: nn.Module, path: Path = GRID, prediction: Any = "eps", target: nn.Module | None = None) -> SimpleNamespace:
    modules = {"student": student, "target": target or TinyNetwork(), "teacher": TinyNetwork()}
    return SimpleNamespace(**{role: Denoiser(module, path, prediction) for role, module in modules.items()})


@pytest.mark.parametrize("solver, calls", [("ddim", 1), ("dpmpp_2s", 2)])
def test_the_solver_takes_the_teachers_steps(solver: Any, calls: int) -> None:
    nets = nets_of(TinyNetwork())
    LatentConsistency(solver=solver).loss(nets, batch_of(8), noise_of(8))
    assert len(nets.teacher.network.seen) == calls


def test_the_distance_is_quadratic_below_huber_and_linear_above() -> None:
    found, target = torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2)
    taught = Taught(found, target, found, torch.zeros(1, dtype=torch.int64))
    assert LatentConsistency(huber=4.0).distances(taught).tolist() == [[1.0, 0.0]]  # sqrt(9 + 16) - 4
    assert LatentConsistency(distance="l2").distances(taught).tolist() == [[9.0, 0.0]]


def test_gradients_reach_the_student_only() -> None:
    nets = nets_of(TinyNetwork())
    LatentConsistency().loss(nets, batch_of(16), noise_of(16)).value.backward()
    for role in ("teacher", "target"):
        assert all(p.grad is None for p in getattr(nets, role).network.parameters())
    assert all(p.grad is not None for p in nets.student.network.parameters())


def test_the_target_is_held_fixed_when_it_is_the_student_itself() -> None:
    method, network = LatentConsistency(), TinyNetwork()

    def loss(module: nn.Module) -> Tensor:
        return method.loss(nets_of(module, target=module), batch_of(64), noise_of(64)).value

    assert gradients_hold_calls_fixed(loss, network, frozen=(0,)) == 2


def test_the_target_is_the_average_which_follows_the_students_step() -> None:
    first, last = LatentConsistency(target_decay=0.9).updates(Clock(0, 8, 80))
    assert first.role == "student" and last == Follow("target", of="student", decay=0.9)  # type: ignore[union-attr]
    student, batch = TinyNetwork(), batch_of(16)
    other = TinyNetwork()
    with torch.no_grad():
        other.layers[2].bias.add_(1.0)
    losses = [LatentConsistency().loss(nets_of(student, target=target), batch, noise_of(16)).value for target in (student, other)]
    assert losses[0] != losses[1]


def test_the_weights_are_an_input_only_where_they_vary() -> None:
    class Spy(TinyNetwork):
        def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
            self.conditions = [*getattr(self, "conditions", []), condition or {}]
            return super().forward(x, t, condition)

    for guidance, inputs in (((3.0, 15.0), ("guidance",)), ((2.0, 2.0), ())):
        method, spy = LatentConsistency(guidance=guidance), Spy()
        assert {role: method.roles[role].inputs for role in ("teacher", "student", "target")} == {
            "teacher": (), "student": inputs, "target": inputs,
        }  # fmt: skip
        nets = nets_of(spy, target=spy)
        method.loss(nets, batch_of(500), noise_of(500))
        for condition in spy.conditions:
            assert set(condition) == {"label", *inputs}
            for w in [condition[name] for name in inputs]:
                assert 2.0 <= w.min() < 2.2 and 13.8 < w.max() < 14.0


@pytest.mark.parametrize("path", [RectifiedFlow(), TrigFlow(), VariancePreserving()])
def test_points_lie_on_the_grid_at_equal_signal_to_noise_ratio(path: Path) -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        seen.append(t)
        return x

    nets = SimpleNamespace(**{role: Denoiser(network, path, "v") for role in ("student", "target", "teacher")})
    LatentConsistency(guidance=(1.0, 1.0), count=10, stride=100).loss(nets, {"x": batch_of(64)["x"].double()}, noise_of(64))
    _, target, student = seen  # the teacher's first
    ends = torch.arange(99, 1000, 100, dtype=torch.float64)
    levels = torch.cat([torch.zeros(1, dtype=torch.float64), ends])
    if not isinstance(path, VariancePreserving):
        levels = path.network_time(convert_time(levels, GRID, path))
    index = (student[:, None] - levels[1:]).abs().argmin(1)
    torch.testing.assert_close(student, levels[1:][index])
    torch.testing.assert_close(target, levels[index], rtol=1e-6, atol=1e-6)
    assert set(index.tolist()) == set(range(10))


def test_the_sampler_is_that_of_the_timesteps() -> None:
    method = LatentConsistency(count=20, stride=50)
    assert method.own_sampler() == LCM(count=20, stride=50, guidance=9)  # of what it is taught, 3 to 15, the middle
    method.check_sampler(method.own_sampler())
    assert LatentConsistency(count=2, stride=500).own_sampler() == LCM(steps=2, count=2, stride=500, guidance=9)  # there are no more
    for sampler, message in (
        (LCM(), "on 20 timesteps 50 apart, and the sampler lcm asks it on 50 20 apart"),
        (Consistency(), "at which consistency does not ask; take lcm"),
        (LCM(count=20, stride=50, guidance=2), "is taught guidance 3 to 15, not 2"),
        (LCM(count=20, stride=50, guidance=16), "is taught guidance 3 to 15, not 16"),
    ):
        with pytest.raises(ValueError, match=message):
            method.check_sampler(sampler)
    built_in = LatentConsistency(guidance=(2.0, 2.0))
    for guidance in (1.0, 2.0):
        built_in.check_sampler(LCM(guidance=guidance))
    with pytest.raises(ValueError, match="guidance 2 is built in, and 3 would change nothing"):
        built_in.check_sampler(LCM(guidance=3))


def test_mistakes_are_told_as_the_configuration_loads() -> None:
    method = build(Method, Document({"name": "latent_consistency", "stride": 30}, "x.yaml"))
    with pytest.raises(ConfigError, match="count: count 50 times stride 30 goes beyond the 1000 timesteps; let their product be"):
        method.check(RectifiedFlow())
    with pytest.raises(ConfigError, match="count: the last of 10 timesteps 20 apart is 199, where 76% of x is data"):
        LatentConsistency(count=10).check(RectifiedFlow())
    with pytest.raises(ConfigError, match="with target_decay 1 the target would stay the teacher"):
        build(Method, Document({"name": "latent_consistency", "target_decay": 1}, "x.yaml"))
    with pytest.raises(ConfigError, match=r"\[9, 3\] reads \[lowest, highest\]"):
        build(Method, Document({"name": "latent_consistency", "guidance": [9, 3]}, "x.yaml"))
    settings = {"method": "latent_consistency", "data": "rings", "model": "mlp", "training": {"samples": 10}}
    with pytest.raises(ConfigError, match=r"needs the weights of its teacher"):
        parse_run(Document(settings, "x.yaml"))
    given = {"teacher": {"weights": "runs/teacher"}}
    with pytest.raises(ConfigError, match=r"roles\.target\.engine: the role follows 'student'.*; give both the same"):
        parse_run(Document(settings | {"roles": given | {"target": {"engine": "torch"}}}, "x.yaml"))
    with pytest.raises(ConfigError, match=r"roles\.target: the role follows 'student'.*; give both the same adapter or trainable"):
        parse_run(Document(settings | {"roles": given | {"student": {"trainable": "output"}}}, "x.yaml"))
    parse_run(Document(settings | {"roles": given, "trainable": "output"}, "x.yaml"))
    settings |= {"roles": given, "model": "dropout_mlp"}
    with pytest.raises(
        ConfigError,
        match=r"latent_consistency on these data gives its network further inputs \(guidance\), which dropout_mlp does not take",
    ):
        build_network(parse_run(Document(settings, "x.yaml")), "student")
