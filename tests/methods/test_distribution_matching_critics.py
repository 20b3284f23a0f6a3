"""Students of several steps, and critics on features: LADD."""

from __future__ import annotations

from pathlib import Path as FilePath
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gentrain.config import ConfigError
from gentrain.methods.base import Clock
from gentrain.methods.distribution_matching import DistributionMatching, gan_critic_loss, gan_generator_loss, logits_of, vsd_loss
from gentrain.methods.sfd import score_identity_loss
from gentrain.models.denoiser import Denoiser
from gentrain.models.heads import Heads
from gentrain.noise import Noise
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.times import LogNormal
from gentrain.samplers.few_step import FewStep, call_times, simulate
from gentrain.samplers.one_step import generate
from gentrain.training.memory import memory_of
from gentrain.training.roles import Roles
from gentrain.training.run import load_run
from gentrain.training.world import World
from tests.methods.test_distribution_matching import RUN, frozen, gradients, nets_of
from tests.methods.toy import batch_of, noise_of

# --- several steps ----------------------------------------------------------------------------------------------------------


def simulated(nets: SimpleNamespace, steps: int) -> tuple[Tensor, Tensor, Any]:
    """(x_t, t) that the student's last call reads, and the noise that is left; in the order in which the method draws."""
    noise, condition = noise_of(16), {"label": batch_of(16)["label"]}
    z = noise.normal((16, 2))
    stage = noise.randint(0, steps, (16,))
    assert len(stage.unique()) == steps
    return *simulate(nets.student, FewStep(steps=steps), z, stage, noise, condition), noise


def test_a_student_of_three_steps_learns_at_its_own_samples() -> None:
    """The gradient is that of one call at what the calls before had come to, held fixed."""
    nets, method = nets_of(), DistributionMatching(steps=3)
    frozen(nets, "student")
    value = method.student_loss(nets, batch_of(16), noise_of(16)).value
    value.backward()
    got = gradients(nets, "student")
    nets.student.network.zero_grad()
    x_t, t, noise = simulated(nets, 3)
    assert not x_t.requires_grad
    condition = {"label": batch_of(16)["label"]}
    x_g = nets.student.x0(x_t, t, condition)
    s = method.times.sample(noise.uniform((16,)), RectifiedFlow())
    x_s = RectifiedFlow().perturb(x_g, noise.normal((16, 2)), s).detach()
    expected = vsd_loss(x_g, nets.teacher.x0(x_s, s, condition), nets.fake_score.x0(x_s, s, condition))
    torch.testing.assert_close(value, expected)
    expected.backward()
    for ours, theirs in zip(got, gradients(nets, "student"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


def test_the_fake_score_learns_from_samples_of_every_step() -> None:
    nets, method = nets_of(), DistributionMatching(steps=2)
    frozen(nets, "fake_score")
    value = method.fake_score_loss(nets, batch_of(16), noise_of(16)).value
    with torch.no_grad():
        x_t, t, noise = simulated(nets, 2)
        condition = {"label": batch_of(16)["label"]}
        x_g = nets.student.x0(x_t, t, condition)
        s, eps = method.times.sample(noise.uniform((16,)), RectifiedFlow()), noise.normal((16, 2))
        raw = nets.fake_score.raw(RectifiedFlow().perturb(x_g, eps, s), s, condition)
        torch.testing.assert_close(value.detach(), (raw - nets.fake_score.target(x_g, eps, s)).square().mean())


def test_the_calls_before_are_without_gradient_and_as_many_on_each_row() -> None:
    nets, method, calls = nets_of(), DistributionMatching(steps=4), []
    forward = nets.student.network.forward
    nets.student.network.forward = lambda x, t, c=None: (calls.append((len(x), torch.is_grad_enabled())), forward(x, t, c))[1]
    frozen(nets, "student")
    method.student_loss(nets, batch_of(16), noise_of(16))
    assert calls == [(16, False)] * 3 + [(16, True)]


class Doubles(Noise):
    """Float64 all through, so that formulas agree to 1e-12."""

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
        return super().normal(shape, torch.float64)

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
        return super().uniform(shape, low, high).double()


def linear(weight: Tensor, seen: list[set[str]], reads_step: bool) -> Denoiser:
    """x0 = w0 x + w1 t + w2 label, + w3 step where it is told."""

    def network(x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        seen.append(set(condition))
        value = weight[0] * x + (weight[1] * t / 1000 + weight[2] * condition["label"])[:, None]
        return value + (weight[3] * condition["step"] / 1000)[:, None] if reads_step else value

    return Denoiser(network, RectifiedFlow(), "x0")


@pytest.mark.parametrize(("loss", "sigma"), [("vsd", 2.5), ("dmd", 1.5), ("sid", 2.5)])
def test_the_fake_score_alone_is_told_the_step_and_no_gradient_passes_through_the_calls_before(loss: Any, sigma: float) -> None:
    """Three linear networks by hand, in two steps: values and gradients of both losses."""
    weights = {
        name: torch.tensor(values, dtype=torch.float64, requires_grad=True)
        for name, values in {
            "teacher": [0.6, 0.2, 0.1, 0.0], "fake_score": [0.4, -0.3, 0.2, 0.7], "student": [0.5, 0.3, -0.2, 0.0],
        }.items()
    }  # fmt: skip
    seen: dict[str, list[set[str]]] = {name: [] for name in weights}
    nets: Any = SimpleNamespace(**{name: linear(weights[name], seen[name], name == "fake_score") for name in weights})
    method = DistributionMatching(generator_loss=loss, steps=2, fake_score_reads_step=True, sigma=sigma)
    label, rows = torch.arange(16) % 3, torch.arange(16)
    batch = {"x": torch.zeros(16, 2, dtype=torch.float64), "label": label}

    def by_hand() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(x_g, eps, s, noised x_g, the fake score's x0 there)."""
        noise, (w, f) = Doubles(1, rows), (weights["student"], weights["fake_score"])
        z, second = noise.normal((16, 2)), noise.randint(0, 2, (16,)) == 1
        assert 0 < second.sum() < 16
        start = sigma / (1 + sigma)
        t = start - start / 2 * second.double()
        first = (w[0] * start * z + (w[1] * start + w[2] * label)[:, None]).detach()
        x_t = torch.where(second[:, None], (1 - start / 2) * first + start / 2 * noise.normal((16, 2)), start * z)
        x_g = w[0] * x_t + (w[1] * t + w[2] * label)[:, None]
        s, eps = method.times.sample(noise.uniform((16,)), RectifiedFlow()), noise.normal((16, 2))
        x_s = (1 - s)[:, None] * x_g + s[:, None] * eps
        return x_g, eps, s, x_s, f[0] * x_s + (f[1] * s + f[2] * label + f[3] * t)[:, None]

    value = method.fake_score_loss(nets, batch, Doubles(1, rows)).value
    x_g, _, s, x_s, fake = by_hand()
    expected = (fake - x_g.detach()).square().mean()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    value.backward()
    with torch.no_grad():
        x_g, _, s, x_s, _ = by_hand()
    assert weights["student"].grad is None and weights["teacher"].grad is None and weights["fake_score"].grad is not None

    value = method.student_loss(nets, batch, Doubles(1, rows)).value
    x_g, _, s, x_s, fake = by_hand()
    v = weights["teacher"]
    teacher = v[0] * x_s + (v[1] * s + v[2] * label)[:, None]
    if loss == "sid":
        expected = score_identity_loss(x_g, teacher, fake, 1.2).mean() / 2
    else:
        error = 1 / ((x_g - teacher).detach().abs().mean(1) + 1e-6) if loss == "dmd" else 1 - s
        gradient = (error[:, None] * (fake - teacher)).detach()
        expected = (x_g - (x_g - gradient).detach()).square().mean() / 2
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(each, weights["student"])[0] for each in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    assert all(each == {"label"} for name in ("teacher", "student") for each in seen[name])
    assert seen["fake_score"] == [{"label", "step"}] * 2


def test_its_own_sampler_has_its_steps(tmp_path: FilePath) -> None:
    (tmp_path / "main.yaml").write_text(RUN)
    run = load_run(tmp_path / "main.yaml", ["method.steps=4", "method.sigma=1.5"])
    assert run.sampler == FewStep(steps=4, sigma=1.5)
    torch.testing.assert_close(call_times(run.path, 1.5, 4)[0].item(), 0.6)
    for sampler in ("one_step", "{name: few_step, steps: 3, sigma: 1.5}", "consistency"):
        with pytest.raises(ConfigError, match=r"a student of 4 steps at sigma 1\.5"):
            load_run(tmp_path / "main.yaml", ["method.steps=4", "method.sigma=1.5", f"sampler={sampler}"])


# --- the critic's own times and heads ----------------------------------------------------------------------------------------


def test_ladd_is_the_adversarial_term_alone() -> None:
    nets, method = nets_of(), DistributionMatching(generator_loss="ladd", critic_weight=0.5, critic_times=LogNormal(mean=1.0, std=0.5))
    frozen(nets, "student")
    loss = method.student_loss(nets, batch_of(16), noise_of(16))
    loss.value.backward()
    got = gradients(nets, "student")
    nets.student.network.zero_grad()
    noise, condition = noise_of(16), {"label": batch_of(16)["label"]}
    x_g = generate(nets.student, noise.normal((16, 2)), 2.5, condition)
    noise.uniform((16,)), noise.normal((16, 2))  # of the scores, which nothing reads
    t = LogNormal(mean=1.0, std=0.5).sample(noise.uniform((16,)), RectifiedFlow())
    x_t = RectifiedFlow().perturb(x_g, noise.normal((16, 2)), t)
    expected = gan_generator_loss(logits_of(nets.critic.raw(x_t, t, condition)))
    torch.testing.assert_close(loss.value, 0.5 * expected)
    assert set(loss.logs) == {"adversarial"}
    (0.5 * expected).backward()
    for ours, theirs in zip(got, gradients(nets, "student"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


def test_the_critic_looks_at_times_of_its_own() -> None:
    law = LogNormal(mean=1.0, std=0.5)
    nets, method = nets_of(), DistributionMatching(critic_weight=0.5, critic_times=law)
    frozen(nets, "critic")
    loss = method.critic_loss(nets, batch_of(16), noise_of(16))
    with torch.no_grad():
        noise, condition = noise_of(16), {"label": batch_of(16)["label"]}
        x_g = generate(nets.student, noise.normal((16, 2)), 2.5, condition)
        t, eps = law.sample(noise.uniform((16,)), RectifiedFlow()), noise.normal((16, 2))
        drawn = nets.critic.raw(RectifiedFlow().perturb(x_g, eps, t), t, condition)
        real = nets.critic.raw(RectifiedFlow().perturb(batch_of(16)["x"], noise.normal((16, 2)), t), t, condition)
    torch.testing.assert_close(loss.value.detach(), gan_critic_loss(logits_of(real), logits_of(drawn)))
    frozen(nets, "student")
    both = method.student_loss(nets, batch_of(16), noise_of(16))
    alone = DistributionMatching().student_loss(nets, batch_of(16), noise_of(16))
    ladd = DistributionMatching(generator_loss="ladd", critic_weight=0.5, critic_times=law).student_loss(nets, batch_of(16), noise_of(16))
    torch.testing.assert_close(both.value, alone.value + ladd.value)


@pytest.mark.parametrize(
    ("fields", "roles"),
    [
        ({"generator_loss": "ladd", "critic_weight": 1.0}, ["critic", "student"]),
        ({"critic_weight": 0.1, "critic_heads": Heads()}, ["fake_score", "critic", "student"]),
        ({"generator_loss": "js", "critic_heads": Heads(of="fake_score")}, ["fake_score", "critic", "student"]),
    ],
)
def test_roles_and_their_order(fields: dict[str, Any], roles: list[str]) -> None:
    method = DistributionMatching(**fields)
    assert [update.role for update in method.updates(Clock(0, 4, 40))] == roles
    assert set(method.roles) == {"teacher", *roles}
    assert method.roles["critic"].heads == (fields.get("critic_heads") or Heads())


HEADS = ["method.critic_weight=0.1", "model={name: mlp, width: 16, depth: 2}"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> FilePath:
    from gentrain.training.loop import train
    from gentrain.training.run import save_config
    from gentrain.training.world import join

    root = tmp_path_factory.mktemp("runs")
    (root / "teacher.yaml").write_text("method: flow_matching\ndata: rings\nmodel: {name: mlp, width: 16, depth: 2}\nengine: torch\n")
    run = load_run(root / "teacher.yaml", [f"output={root / 'teacher'}", "training={samples: 32, batch_size: 16}"])
    save_config(run)
    train(run, join(), lambda: False, [])
    return root


def run_of(root: FilePath, *overrides: str) -> Any:
    (root / "main.yaml").write_text(RUN.replace("runs/teacher", str(root / "teacher")))
    return load_run(root / "main.yaml", [*HEADS, *overrides])


@pytest.mark.parametrize("on", ["teacher", "fake_score"])
def test_heads_share_the_network_that_they_read(teacher: FilePath, on: str) -> None:
    run = run_of(teacher, f"method.critic_heads={{of: {on}}}")
    roles = Roles(run, World(rank=0, size=1, device=torch.device("cpu")))
    critic = roles.engines["critic"].module
    below = roles.frozen["teacher"] if on == "teacher" else roles.engines["fake_score"].module
    assert critic.base.network is below
    assert all(p.requires_grad for p in roles.engines["fake_score"].module.parameters())
    rows = torch.arange(4)
    batch = {"x": torch.randn(4, 2), "label": rows % 3, "index": rows}
    with roles.stepping("critic") as nets:
        loss = run.method.critic_loss(nets, batch, noise_of(4))
        roles.engines["critic"].backward(loss.value, last=True)
    assert all(p.grad is not None for p in critic.parameters())
    assert all(p.grad is None for p in below.parameters())
    with roles.stepping("student") as nets:
        value = nets.critic.raw(torch.randn(4, 2, requires_grad=True), torch.full((4,), 0.5), {"label": rows % 3})
    assert value.requires_grad


def test_a_plan_counts_the_heads_and_no_copy_of_the_network(teacher: FilePath) -> None:
    plans = {}
    for heads in ("null", "{of: teacher, width: 4}", "{of: fake_score, width: 4}"):
        plans[heads] = {part.name: part.resting for part in memory_of(run_of(teacher, f"method.critic_heads={heads}")).parts}
    own, frozen_one, live = plans.values()
    assert frozen_one.keys() == {"below teacher, critic", "fake_score", "critic", "student"}
    assert live.keys() == own.keys() == {"teacher", "fake_score", "critic", "student"}
    assert frozen_one["critic"] == live["critic"] < own["critic"] / 3
    assert frozen_one["below teacher, critic"] == own["teacher"] == live["teacher"]


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("method={generator_loss: ladd}", "method.critic_weight", "the adversarial term alone; set it to 1"),
        ("method={generator_loss: ladd, critic_weight: 1, guidance: 2}", "method.guidance", "guides nobody; leave it out"),
        ("method={generator_loss: ladd, critic_weight: 1, guidance_times: uniform}", "method.guidance_times", "guides nobody"),
        ("method={generator_loss: ladd, critic_weight: 1, critic_heads: {of: fake_score}}", "method.critic_heads.of", "no fake score"),
        ("method={critic_heads: {}}", "method.critic_heads", "there is no critic; set critic_weight above 0"),
        ("method={critic_times: uniform}", "method.critic_times", "there is no critic"),
        ("method={spectral_decoupling: 0.1}", "method.spectral_decoupling", "there is no critic"),
        ("method={generator_loss: kl, critic_times: uniform}", "method.critic_times", "where the scores are compared"),
        ("method={critic_weight: 1, critic_heads: {layers: '('}}", "method.critic_heads", "no regular expression of layers"),
        ("method={generator_loss: ladd, critic_weight: 1} roles.fake_score.weights=runs/x", "roles.fake_score", "has no role 'fake_score'"),
        ("method={critic_weight: 1, critic_heads: {}} roles.critic.adapter.rank=4", "roles.critic.adapter", "learns heads"),
        (
            "method={critic_weight: 1, critic_heads: {of: fake_score}} roles.critic.model=mlp",
            "roles.critic.model",
            "features of fake_score",
        ),
        ("method={critic_weight: 1, critic_heads: {}} roles.critic.weights=runs/x", "roles.critic.weights", "features of teacher"),
        ("method.steps=100000", "method.steps", "tell the times of 100000 calls apart; take at most 714"),
        ("method.steps=0", "method.steps", "expected a whole number > 0"),
    ],
)
def test_mistakes_are_told_as_the_file_loads(tmp_path: FilePath, override: str, key: str, message: str) -> None:
    (tmp_path / "main.yaml").write_text(RUN)
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path / "main.yaml", override.split(" roles")[:1] + [f"roles{rest}" for rest in override.split(" roles")[1:]])
    assert caught.value.key == key and message in caught.value.message


def test_layers_that_the_network_has_not_are_told(teacher: FilePath) -> None:
    with pytest.raises(ConfigError, match=r"'mid_block' is found in no name of its layers") as caught:
        memory_of(run_of(teacher, "method.critic_heads={layers: mid_block}"))
    assert caught.value.key == "method.critic_heads.layers"
