"""Distribution matching: formulas in float64, where gradients flow, the order of updates, what the configuration refuses."""

from __future__ import annotations

from pathlib import Path as FilePath
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from gentrain.config import ConfigError
from gentrain.methods.base import Clock
from gentrain.methods.distribution_matching import (
    DistributionMatching,
    Divergence,
    GeneratorLoss,
    divergence_weight,
    f_weight,
    gan_critic_loss,
    gan_generator_loss,
    logits_of,
    pseudo_target_loss,
    spectral_decoupling,
    vsd_loss,
)
from gentrain.methods.sfd import score_identity_loss
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.times import LogNormal
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.samplers.one_step import OneStep
from gentrain.training.run import load_run
from tests.methods.toy import TinyNetwork, batch_of, noise_of

DIVERGENCES = get_args(Divergence)


class Alone:
    """The group of one process."""

    def mean(self, value: Tensor) -> Tensor:
        return value.detach()

    def gather(self, value: Tensor) -> Tensor:
        return value.detach()


class Ranks(Alone):
    """What rank 0 of several sees, whose other ranks hold `others`."""

    def __init__(self, *others: dict[str, Tensor]):
        self.others, self.rank = others, {}

    def gather(self, value: Tensor) -> Tensor:
        kind = "bins" if value.dtype == torch.int64 else "ratio"
        return torch.cat([value.detach(), *[other[kind] for other in self.others]])


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the functions ----------------------------------------------------------------------------------------------------------


def test_the_pseudo_target_has_the_given_gradient_over_the_number_of_elements() -> None:
    x, gradient = rows(3, 2, 2).requires_grad_(), rows(3, 2, 2, seed=1).requires_grad_()
    loss = pseudo_target_loss(x, gradient)
    loss.backward()
    torch.testing.assert_close(x.grad, gradient.detach() / 12, rtol=1e-12, atol=0)
    assert gradient.grad is None
    assert loss.item() == pytest.approx(gradient.square().sum().item() / 24)


@pytest.mark.parametrize("weighted", [False, True])
def test_vsd_loss_is_the_normalised_difference(weighted: bool) -> None:
    x, teacher, fake = (rows(4, 3, 2, seed=seed).requires_grad_() for seed in range(3))
    weight = rows(4, seed=3).exp().requires_grad_() if weighted else None
    loss = vsd_loss(x, teacher, fake, weight)
    loss.backward()
    expected = torch.empty(4, 3, 2, dtype=torch.float64)
    for b in range(4):  # by hand, row by row
        error = sum(abs(x[b, i, j].item() - teacher[b, i, j].item()) for i in range(3) for j in range(2)) / 6
        expected[b] = (fake[b] - teacher[b]).detach() / (error + 1e-6) * (1 if weight is None else weight[b].item())
    torch.testing.assert_close(x.grad, expected / 24, rtol=1e-12, atol=1e-15)
    assert loss.item() == pytest.approx(expected.square().mean().item() / 2)
    assert teacher.grad is None and fake.grad is None and (weight is None or weight.grad is None)


def test_vsd_loss_counts_in_float32_and_bears_a_perfect_teacher() -> None:
    x = torch.full((1, 2), 0.5, dtype=torch.bfloat16, requires_grad=True)
    loss = vsd_loss(x, x.detach(), x.detach() + 1)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(0.5e12, rel=1e-3)


def test_the_expected_difference_is_the_gradient_of_the_reverse_kl() -> None:
    """Between Gaussians, whose denoisers and divergence are known: the student's mean m is the only thing that learns."""
    alpha, sigma, mu, s, v = 0.6, 0.8, -0.4, 0.5, 0.9
    m = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    spread = rows(200_000)
    spread = (spread - spread.mean()) / spread.std(unbiased=False)
    x = m + v * spread
    x_t = alpha * x + sigma * rows(200_000, seed=1).sub(rows(200_000, seed=1).mean())

    def denoised(mean: float, deviation: float) -> Tensor:
        return mean + alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2) * (x_t - alpha * mean)

    loss = pseudo_target_loss(x, alpha**2 / sigma**2 * (denoised(m.item(), v) - denoised(mu, s)).detach())
    loss.backward()
    mean = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    var_student, var_teacher = alpha**2 * v**2 + sigma**2, alpha**2 * s**2 + sigma**2
    kl = 0.5 * (var_student / var_teacher - 1 + torch.tensor(var_teacher / var_student).log() + (alpha * (mean - mu)) ** 2 / var_teacher)
    kl.backward()
    assert m.grad.item() == pytest.approx(mean.grad.item(), rel=1e-9)  # the means of x and of the noise are exact


GENERATING = {
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "sf": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "neyman": lambda r: (1 - r) ** 2 / (2 * r),
    "sh": lambda r: 2 * (1 - r.sqrt()) ** 2,
    "jf": lambda r: (r - 1) * r.log(),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_f_weight_is_r_squared_times_the_second_derivative(name: Divergence) -> None:
    r = torch.tensor([0.05, 0.3, 1.0, 2.5, 30.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(GENERATING[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(f_weight(name, r), r.detach() ** 2 * second, rtol=1e-9, atol=1e-12)


def test_an_unknown_divergence_is_told() -> None:
    with pytest.raises(ValueError, match="no divergence 'tv'; there are: rkl, kl"):
        f_weight("tv", torch.ones(1))  # type: ignore[arg-type]


def test_the_critics_optimum_is_the_log_ratio_of_densities() -> None:
    p, q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), torch.tensor([0.6, 0.1, 0.3], dtype=torch.float64)
    logit = (p / q).log().requires_grad_()
    counts = torch.arange(3)
    real, fake = logit[counts.repeat_interleave((10 * p).long())], logit[counts.repeat_interleave((10 * q).round().long())]
    gan_critic_loss(real, fake).backward()
    torch.testing.assert_close(logit.grad, torch.zeros_like(logit), rtol=0, atol=1e-12)
    logits = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    assert gan_generator_loss(logits).item() == pytest.approx(-logits.sigmoid().log().mean().item())
    expected = -logits.sigmoid().log().mean() - (1 - (3 * logits).sigmoid()).log().mean()
    assert gan_critic_loss(logits, 3 * logits).item() == pytest.approx(expected.item())


def test_logits_are_means_over_everything_but_rows() -> None:
    assert torch.equal(logits_of(torch.tensor([[[1.0, 3.0]], [[5.0, 5.0]]])), torch.tensor([2.0, 5.0]))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_ratios_have_mean_one_in_each_bin_and_weights_over_all(name: Divergence) -> None:
    logits, bins = torch.tensor([0.5, -1.0, 2.0, 0.0, -0.5, 1.0], dtype=torch.float64), torch.tensor([0, 0, 0, 7, 7, 9])
    weight = divergence_weight(name, logits, bins, Alone())
    r = logits.exp()
    r = torch.cat([r[:3] / r[:3].mean(), r[3:5] / r[3:5].mean(), torch.ones(1, dtype=torch.float64)])
    expected = f_weight(name, r)
    torch.testing.assert_close(weight, expected / expected.mean())
    shifted = divergence_weight(name, logits + torch.tensor([1.0, 1, 1, -2, -2, 3]), bins, Alone())
    torch.testing.assert_close(shifted, weight)


def test_ratios_are_clipped_and_carry_no_gradient() -> None:
    logits = torch.tensor([50.0] + [0.0] * 99, requires_grad=True)
    weight = divergence_weight("kl", logits, torch.zeros(100, dtype=torch.int64), Alone())
    expected = torch.tensor([20.0] + [0.1] * 99)  # the mean of the bin is exp(10) / 100
    torch.testing.assert_close(weight, expected / expected.mean())
    assert not weight.requires_grad


def test_bins_are_those_of_all_ranks() -> None:
    logits, bins = rows(8), torch.tensor([0, 1, 0, 1, 2, 0, 1, 2])
    whole = divergence_weight("kl", logits, bins, Alone())
    there = Ranks({"ratio": logits[4:].exp(), "bins": bins[4:]})
    half = divergence_weight("kl", logits[:4], bins[:4], there)
    torch.testing.assert_close(half / half[0], whole[:4] / whole[0])


# --- the method -------------------------------------------------------------------------------------------------------------


def nets_of(path: Path | None = None, prediction: str = "velocity", **networks: TinyNetwork) -> SimpleNamespace:
    path = path or RectifiedFlow()
    names = ("teacher", "fake_score", "student", "critic")
    made = {name: Denoiser(networks.get(name) or shaken(index), path, prediction) for index, name in enumerate(names)}
    return SimpleNamespace(**made, group=Alone())


def shaken(seed: int) -> TinyNetwork:
    network = TinyNetwork()
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return network


def frozen(nets: SimpleNamespace, stepped: str) -> None:
    for name in ("teacher", "fake_score", "student", "critic"):
        getattr(nets, name).network.requires_grad_(name == stepped)


def gradients(nets: SimpleNamespace, role: str) -> list[Tensor]:
    return [p.grad.clone() for p in getattr(nets, role).network.parameters()]


def loss_of(method: DistributionMatching, role: str, nets: SimpleNamespace) -> Tensor:
    frozen(nets, role)
    return getattr(method, {"fake_score": "fake_score_loss", "critic": "critic_loss", "student": "student_loss"}[role])(
        nets, batch_of(16), noise_of(16)
    ).value


def by_hand(nets: SimpleNamespace, method: DistributionMatching) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """(x_g, x_t, t, eps, condition): what the method's draws must give, in the order in which it makes them."""
    noise, batch = noise_of(16), batch_of(16)
    condition = {"label": batch["label"]}
    start = method.sigma / (1 + method.sigma) if isinstance(nets.student.path, RectifiedFlow) else method.sigma
    at_start = torch.full((16,), start)
    x_g = nets.student.x0(nets.student.path.sigma(at_start)[0] * noise.normal((16, 2)), at_start, condition)
    u = noise.uniform((16,))
    t, eps = method.times.sample(u, nets.student.path), noise.normal((16, 2))
    return x_g, nets.student.path.perturb(x_g, eps, t), t, eps, condition


@pytest.mark.parametrize("name", ["vsd", "dmd"])
@pytest.mark.parametrize(("guidance", "sigma"), [(1.0, 2.5), (2.0, 1.5)])
def test_the_students_gradient_is_the_pseudo_targets(name: GeneratorLoss, guidance: float, sigma: float) -> None:
    nets, method = nets_of(), DistributionMatching(generator_loss=name, guidance=guidance, sigma=sigma)
    loss_of(method, "student", nets).backward()
    got = gradients(nets, "student")
    nets.student.network.zero_grad()
    x_g, x_t, t, _, condition = by_hand(nets, method)
    x_t = x_t.detach()  # nothing flows through what the networks are given
    null = {"label": torch.full((16,), -1)}
    teacher = nets.teacher.x0(x_t, t, null)
    teacher = teacher + guidance * (nets.teacher.x0(x_t, t, condition) - teacher)
    difference = nets.fake_score.x0(x_t, t, condition) - teacher
    error = (x_g.detach() - teacher).abs().mean(1, keepdim=True)
    gradient = difference / (error + 1e-6) if name == "dmd" else (1 - t[:, None]) * difference
    (x_g * gradient.detach()).sum().div(32).backward()
    for ours, theirs in zip(got, gradients(nets, "student"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)
    assert max(g.abs().max() for g in got) > 1e-5


def test_sid_is_the_score_identity_with_gradients_through_both_networks() -> None:
    nets, method = nets_of(), DistributionMatching(generator_loss="sid", alpha=1.2)
    value = loss_of(method, "student", nets)
    value.backward()
    got = gradients(nets, "student")
    nets.student.network.zero_grad()
    x_g, x_t, t, _, condition = by_hand(nets, method)
    expected = score_identity_loss(x_g, nets.teacher.x0(x_t, t, condition), nets.fake_score.x0(x_t, t, condition), 1.2).mean() / 2
    expected.backward()
    torch.testing.assert_close(value, expected)
    for ours, theirs in zip(got, gradients(nets, "student"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)
    nets.student.network.zero_grad()
    x_g, x_t, t, _, condition = by_hand(nets, method)
    cut = score_identity_loss(x_g, nets.teacher.x0(x_t.detach(), t, condition), nets.fake_score.x0(x_t, t, condition), 1.2).mean() / 2
    cut.backward()
    assert not torch.allclose(got[0], gradients(nets, "student")[0], rtol=1e-3)


def test_rkl_is_dmd2_exactly() -> None:
    values, grads = [], []
    for name in ("rkl", "dmd"):
        nets, method = nets_of(), DistributionMatching(generator_loss=name, critic_weight=0.1)
        value = loss_of(method, "student", nets)
        value.backward()
        values.append(value.detach())
        grads.append(gradients(nets, "student"))
    assert torch.equal(*values) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "rkl"])
def test_a_divergence_weighs_the_rows_of_dmd(name: Divergence) -> None:
    nets, method = nets_of(), DistributionMatching(generator_loss=name)
    value = loss_of(method, "student", nets)
    with torch.no_grad():
        x_g, x_t, t, _, condition = by_hand(nets, method)
        noise = noise_of(16)
        noise.normal((16, 2))
        bins = (10 * noise.uniform((16,))).long()
        weight = divergence_weight(name, logits_of(nets.critic.raw(x_t, t, condition)), bins, Alone())
        assert weight.std() > 1e-3
        expected = vsd_loss(x_g, nets.teacher.x0(x_t, t, condition), nets.fake_score.x0(x_t, t, condition), weight)
    torch.testing.assert_close(value, expected)


def test_the_adversarial_term_reaches_the_student_through_the_critic() -> None:
    nets = nets_of()
    both = loss_of(DistributionMatching(critic_weight=0.5), "student", nets)
    alone = loss_of(DistributionMatching(), "student", nets)
    x_g, x_t, t, _, condition = by_hand(nets, DistributionMatching())
    adversarial = gan_generator_loss(logits_of(nets.critic.raw(x_t, t, condition)))
    torch.testing.assert_close(both - alone, 0.5 * adversarial)
    nets.student.network.zero_grad()
    (both - alone).backward()
    got = gradients(nets, "student")
    nets.student.network.zero_grad()
    adversarial.backward()
    torch.testing.assert_close(got[0], 0.5 * gradients(nets, "student")[0], rtol=1e-3, atol=1e-7)
    assert got[0].abs().max() > 0


@pytest.mark.parametrize(
    ("path", "prediction", "sigma"),
    [(RectifiedFlow(), "velocity", 2.5), (RectifiedFlow(), "velocity", 1.5), (VarianceExploding(), "edm", 2.5)],
)
def test_the_fake_score_learns_to_denoise_what_the_student_draws(path: Path, prediction: str, sigma: float) -> None:
    nets, method = nets_of(path, prediction), DistributionMatching(sigma=sigma)
    value = loss_of(method, "fake_score", nets)
    with torch.no_grad():
        x_g, x_t, t, eps, condition = by_hand(nets, method)
        expected = (nets.fake_score.raw(x_t, t, condition) - nets.fake_score.target(x_g, eps, t)).square().mean()
    torch.testing.assert_close(value.detach(), expected)
    nets.student.network.requires_grad_(True)
    value = method.fake_score_loss(nets, batch_of(16), noise_of(16)).value
    value.backward()
    assert all(p.grad is None for p in nets.student.network.parameters())
    assert all(p.grad is not None for p in nets.fake_score.network.parameters())


def test_spectral_decoupling_adds_half_the_squared_logits_of_the_critic() -> None:
    """arXiv:2011.09468, eq. 15: lambda / 2 times the mean square, of data and samples, with its gradient."""
    assert spectral_decoupling(torch.tensor([2.0, -4.0, 1.0])).item() == pytest.approx((4 + 16 + 1) / 6)
    values, found = [], []
    for weight in (0.0, 0.3):
        nets = nets_of()
        values.append(loss_of(DistributionMatching(critic_weight=1.0, spectral_decoupling=weight), "critic", nets))
        values[-1].backward()
        found.append(gradients(nets, "critic"))
    nets.critic.network.zero_grad()
    logits = torch.cat(logits_by_hand(nets))
    expected = 0.3 * logits.square().sum() / 64
    torch.testing.assert_close((values[1] - values[0]).detach(), expected.detach())
    expected.backward()
    for without, ours, theirs in zip(*found, gradients(nets, "critic"), strict=True):
        torch.testing.assert_close(ours - without, theirs, rtol=1e-4, atol=1e-6)


def logits_by_hand(nets: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """The critic's of data and of samples, [16] each, as the method draws."""
    _, x_t, t, _, condition = by_hand(nets, DistributionMatching())
    noise = noise_of(16)
    for shape in ((16, 2), (16,), (16, 2)):
        noise.normal(shape)
    real = nets.student.path.perturb(batch_of(16)["x"], noise.normal((16, 2)), t)
    return logits_of(nets.critic.raw(real, t, condition)), logits_of(nets.critic.raw(x_t.detach(), t, condition))


def test_the_critic_tells_noised_data_from_noised_samples() -> None:
    nets, method = nets_of(), DistributionMatching(critic_weight=1.0)
    nets.student.network.requires_grad_(True)
    loss = method.critic_loss(nets, batch_of(16), noise_of(16))
    with torch.no_grad():
        real_logits, fake_logits = logits_by_hand(nets)
    torch.testing.assert_close(loss.value.detach(), gan_critic_loss(real_logits, fake_logits))
    loss.value.backward()
    assert all(p.grad is None for p in nets.student.network.parameters())
    assert loss.logs["critic_right"].item() == pytest.approx(((real_logits > 0).sum() + (fake_logits < 0).sum()).item() / 32)


@pytest.mark.parametrize(
    ("fields", "roles"),
    [
        ({}, ["fake_score", "student"]),
        ({"generator_loss": "rkl"}, ["fake_score", "student"]),
        ({"generator_loss": "kl"}, ["fake_score", "critic", "student"]),
        ({"critic_weight": 0.1}, ["fake_score", "critic", "student"]),
    ],
)
def test_the_critic_is_there_when_it_is_needed_and_the_student_goes_last(fields: dict[str, Any], roles: list[str]) -> None:
    method = DistributionMatching(**fields)
    assert [update.role for update in method.updates(Clock(0, 4, 40))] == roles
    assert set(method.roles) == {"teacher", *roles}
    assert ("critic" in DistributionMatching().roles) is False  # the class's own roles are as they were


def test_the_student_learns_in_every_kth_step_by_the_clock() -> None:
    method = DistributionMatching(student_every=3)
    steps = [[update.role for update in method.updates(Clock(4 * step, 4, 40))] for step in range(6)]
    assert ["student" in roles for roles in steps] == [False, False, True, False, False, True]
    assert all(roles[0] == "fake_score" for roles in steps)


RUN = """method: {name: distribution_matching}
data: rings
model: mlp
engine: torch
roles: {teacher: {weights: runs/teacher}}
training: {samples: 64, batch_size: 16}
"""


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("roles={}", "roles.teacher.weights", "needs the weights of its teacher"),
        ("method.generator_loss=tv", "method.generator_loss", "expected one of vsd, dmd, sid"),
        ("method.sigma=100", "method.sigma", "never has sigma / alpha = 100"),
        ("sampler=heun", "sampler", "one step at sigma 2.5"),
        ("path={name: reflected_heat}", "path", "not a space with walls; take free or dual"),
        ("method={generator_loss: sid, guidance_times: uniform}", "method.guidance_times", "leave guidance_times out"),
        ("method.guidance_times=uniform", "method.guidance_times", "guidance 1 is none; leave them out"),
        ("method.student_every=0", "method.student_every", "expected a whole number > 0"),
        ("method.student_every=5", "method.student_every", "the run has 4 steps, in which the student would never learn"),
        ("roles.critic.weights=runs/teacher", "roles.critic", "has no role 'critic'; its roles: teacher, fake_score, student"),
    ],
)
def test_mistakes_are_told_as_the_file_loads(tmp_path: FilePath, override: str, key: str, message: str) -> None:
    text = RUN.replace("roles: {teacher: {weights: runs/teacher}}\n", "") if override == "roles={}" else RUN
    (tmp_path / "main.yaml").write_text(text)
    path = "path={name: variance_exploding}" if "sigma" in override else "seed=0"
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path / "main.yaml", [path, override])
    assert caught.value.key == key and message in caught.value.message


def test_guidance_needs_something_to_guide_by(tmp_path: FilePath) -> None:
    (tmp_path / "main.yaml").write_text(RUN)
    load_run(tmp_path / "main.yaml", ["method.guidance=2"])
    with pytest.raises(ConfigError, match="neither classes nor captions to guide by; set it to 1") as caught:
        load_run(tmp_path / "main.yaml", ["method.guidance=2", "data={name: unlabelled, data: rings}"])
    assert caught.value.key == "method.guidance"


def test_a_student_may_learn_in_the_last_step_alone(tmp_path: FilePath) -> None:
    (tmp_path / "main.yaml").write_text(RUN)
    assert load_run(tmp_path / "main.yaml", ["method.student_every=4"]).method.student_every == 4


def test_its_own_sampler_draws_at_its_sigma(tmp_path: FilePath) -> None:
    (tmp_path / "main.yaml").write_text(RUN)
    assert load_run(tmp_path / "main.yaml", ["method.sigma=1.5"]).sampler == OneStep(sigma=1.5)


def test_a_gaussian_student_finds_its_teacher() -> None:
    """The student is m + s z, both scores are exact: descent ends where the laws agree, and the sign of the gradient is right."""
    m, s = torch.tensor(1.5, requires_grad=True), torch.tensor(0.2, requires_grad=True)
    optimizer = torch.optim.Adam([m, s], lr=0.03, betas=(0.5, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    path, times = RectifiedFlow(), LogNormal(mean=0.0, std=1.0)
    for step in range(300):
        noise = Noise(0, torch.arange(256 * step, 256 * (step + 1)))
        x = m + s * noise.normal((256, 1))
        t = times.sample(noise.uniform((256,)), path)
        x_t = path.perturb(x, noise.normal((256, 1)), t)
        a, b = (1 - t)[:, None], t[:, None]

        def denoised(mean: float, deviation: float, x_t: Tensor = x_t, a: Tensor = a, b: Tensor = b) -> Tensor:
            return mean + a * deviation**2 / (a**2 * deviation**2 + b**2) * (x_t - a * mean)

        optimizer.zero_grad()
        vsd_loss(x, denoised(-0.3, 0.6), denoised(m.item(), s.item())).backward()
        optimizer.step()
        schedule.step()
    assert m.item() == pytest.approx(-0.3, abs=0.05) and abs(s.item()) == pytest.approx(0.6, abs=0.05)
