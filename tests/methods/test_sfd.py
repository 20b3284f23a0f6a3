from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gentrain.config import ConfigError, Document
from gentrain.data.concepts import Concept, Concepts
from gentrain.data.toys import Rings
from gentrain.methods.base import Clock, Frozen
from gentrain.methods.forgetting import class_number, draw_classes
from gentrain.methods.npo import NegativePreference
from gentrain.methods.sfd import ScoreForgetting, fake_score_loss, score_identity_loss
from gentrain.models.denoiser import Denoiser
from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.one_step import OneStep
from gentrain.training.run import RunConfig, parse_run
from tests.methods.captioned import CaptionedPatches
from tests.methods.toy import TinyNetwork, batch_of, noise_of


def draws(count: int = 6) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(count, 3, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3))


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
    return found


# --- the score identity loss ------------------------------------------------------------------------------------------------


def test_the_loss_is_the_formula() -> None:
    """Row by row and number by number, in plain Python."""
    x_g, teacher, fake = draws()
    for row, value in enumerate(score_identity_loss(x_g, teacher, fake, 1.2).tolist()):
        x, y, f = (tensor[row].flatten().tolist() for tensor in (x_g, teacher, fake))
        product = sum((b - c) * ((b - a) - 1.2 * (b - c)) for a, b, c in zip(x, y, f, strict=True))
        omega = sum(abs(b - a) for a, b in zip(x, y, strict=True)) / len(x)
        assert value == pytest.approx(product / omega, rel=1e-12)


def test_alpha_enters_linearly_and_one_is_the_short_form() -> None:
    x_g, teacher, fake = draws()
    at = {alpha: score_identity_loss(x_g, teacher, fake, alpha) for alpha in (0.0, 1.0, 1.2)}
    torch.testing.assert_close(at[1.2], at[0.0] + 1.2 * (at[1.0] - at[0.0]), rtol=1e-10, atol=1e-10)
    omega = (teacher - x_g).abs().flatten(1).mean(1)
    short = ((teacher - fake) * (fake - x_g)).flatten(1).sum(1) / omega
    torch.testing.assert_close(at[1.0], short, rtol=1e-10, atol=1e-10)


def test_with_alpha_one_the_value_is_that_of_diff_instruct_and_the_gradient_is_not() -> None:
    """Diff-Instruct's predictions hold no gradient: its gradient in x_g is -(y - y_fake) / omega; here the predictions move with x_g."""
    x_g, teacher, fake = draws()
    y, f = teacher + 0.5 * x_g, fake + 0.3 * x_g
    omega = (y - x_g).detach().abs().flatten(1).mean(1)[:, None, None]
    ours, theirs = score_identity_loss(x_g, y, f, 1.0), score_identity_loss(x_g, y.detach(), f.detach(), 1.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient(theirs, x_g), -(y - f).detach() / omega, rtol=1e-10, atol=1e-10)
    # by the product rule: d/dx (y - f)(f - x) = 0.2 (f - x) - 0.7 (y - f)
    torch.testing.assert_close(gradient(ours, x_g), (0.2 * (f - x_g) - 0.7 * (y - f)).detach() / omega, rtol=1e-10, atol=1e-10)


def test_omega_alone_is_detached() -> None:
    """Gradients in all three arguments, by hand, with omega a constant."""
    x_g, teacher, fake = draws()
    loss, alpha = score_identity_loss(x_g, teacher, fake, 1.2), 1.2
    omega = (teacher - x_g).detach().abs().flatten(1).mean(1)[:, None, None]
    d = (teacher - fake).detach()
    by_hand = {x_g: -d, teacher: (teacher - x_g).detach() + d - 2 * alpha * d, fake: -(teacher - x_g).detach() + 2 * alpha * d}
    for argument, expected in by_hand.items():
        torch.testing.assert_close(gradient(loss, argument), expected / omega, rtol=1e-10, atol=1e-10)


def test_equal_scores_are_a_fixed_point() -> None:
    x_g, teacher, _ = draws()
    y = teacher + 0.5 * x_g
    loss = score_identity_loss(x_g, y, y, 1.2)
    assert loss.abs().max() == 0 and gradient(loss, x_g).abs().max() < 1e-12


def test_omega_has_a_least_value() -> None:
    x_g = torch.zeros(1, 2, dtype=torch.float64)
    fake = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert score_identity_loss(x_g, x_g, fake, 1.0).item() == pytest.approx(-1 / 1e-5)


@pytest.mark.parametrize("path, prediction", [(RectifiedFlow(), "velocity"), (VariancePreserving(), "v"), (VariancePreserving(), "eps")])
def test_the_fake_score_loss_is_the_error_of_what_its_network_predicts(path: Path, prediction: Any) -> None:
    x0, eps = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    t = torch.linspace(0.2, 0.8, 5, dtype=torch.float64) * path.t_max
    x_t = path.perturb(x0, eps, t)
    denoiser = Denoiser(lambda x, t, c: 0.3 * x + 0.1, path, prediction)
    loss = fake_score_loss(denoiser, x0, t, denoiser.x0(x_t, t))
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    truth = {"velocity": eps - x0, "v": alpha * eps - sigma * x0, "eps": eps}[prediction]
    torch.testing.assert_close(loss, (0.3 * x_t + 0.1 - truth).square().sum(1))


# --- classes ----------------------------------------------------------------------------------------------------------------


def test_a_class_is_given_by_number_or_name() -> None:
    assert class_number("cat", ["dog", "cat"]) == class_number(1, ["dog", "cat"]) == 1


def test_classes_are_drawn_by_their_weights_and_never_without_one() -> None:
    labels = draw_classes(noise_of(40_000), 40_000, torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0]))
    assert labels.unique().tolist() == [1, 3]
    assert (labels == 3).double().mean().item() == pytest.approx(0.75, abs=0.011)  # 5 standard errors


def test_a_class_without_weight_is_not_drawn_at_the_very_edge() -> None:
    zero = SimpleNamespace(rows=torch.zeros(1), uniform=torch.zeros)  # the least number that `uniform` can give
    assert draw_classes(zero, 1, torch.tensor([0.0, 1.0])).tolist() == [1]  # type: ignore[arg-type]


def method_of(**settings: Any) -> ScoreForgetting:
    method = ScoreForgetting(**{"forget": 1, "override": 0, **settings})
    method.check_data(Rings())
    return method


@pytest.mark.parametrize(
    "settings, key, said",
    [
        ({"forget": 3}, "forget", r"there is no class 3; the classes are rings 0, rings 1, rings 2 \(0 to 2\)"),
        ({"forget": "rings"}, "forget", "no class is called 'rings'"),
        ({"forget": 1, "override": 1}, "override", "it is the class to forget; name another one, or uniform"),
        ({"forget": "rings 1", "override": 1}, "override", "it is the class to forget"),
        ({"forget": 1, "override": -1}, "override", "there is no class -1; .* or take uniform or classifier"),
        ({"forget": 1, "prior": [1.0, 1.0]}, "prior", "expected 3 weights"),
        ({"forget": 1, "prior": [1.0, 1.0, -1.0]}, "prior", "none of them negative"),
        ({"forget": 1, "prior": [0.0, 1.0, 0.0]}, "prior", "no class but the forgotten one has a weight"),
        ({"forget": 1, "sigma_min": 14.0}, "sigma_min", "must be below sigma_max 13"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], key: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        ScoreForgetting(**settings).check_data(Rings())
    assert raised.value.key == key


def test_labels_come_from_the_prior_and_the_override_is_as_asked() -> None:
    count = 3000
    assert method_of(prior=[1.0, 5.0, 0.0]).draw_remaining({}, noise_of(count))["label"].unique().tolist() == [0]
    assert method_of().draw_remaining({}, noise_of(count))["label"].unique().tolist() == [0, 2]
    uniform = method_of(override="uniform", prior=[1.0, 5.0, 0.0])
    assert draw_classes(noise_of(count), count, uniform.overrides).unique().tolist() == [0, 2]  # whatever the prior
    assert draw_classes(noise_of(count), count, method_of(override="rings 2").overrides).unique().tolist() == [2]


# --- an alternating step ----------------------------------------------------------------------------------------------------

PATH = VariancePreserving()


def nets_of(path: Path = PATH, prediction: Any = "eps", dtype: torch.dtype = torch.float64, **more: Any) -> SimpleNamespace:
    networks = {}
    for index, role in enumerate(("teacher", "fake_score", "student")):
        network = TinyNetwork().to(dtype)
        with torch.no_grad():  # apart, else the fixed point would hide everything
            for p in network.parameters():
                p.mul_(1 + 0.2 * index)
        networks[role] = Denoiser(network, path, prediction)
    return SimpleNamespace(**networks, **more)


class Recorder:
    """Hands on float64 draws of a Noise and remembers them in order."""

    def __init__(self, count: int):
        self._noise, self.draws = noise_of(count), list[Tensor]()
        self.rows = self._noise.rows

    def __len__(self) -> int:
        return len(self._noise)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        self.draws.append(self._noise.normal(shape, torch.float64))
        return self.draws[-1]

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
        self.draws.append(self._noise.uniform(shape, low, high).double())
        return self.draws[-1]

    def bernoulli(self, probability: float, shape: tuple[int, ...]) -> Tensor:
        self.draws.append(self._noise.bernoulli(probability, shape))
        return self.draws[-1]


def alpha_bar() -> Tensor:
    return (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


def at_time(t: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar), [B, 1], log-SNR linear between timesteps, from the betas alone."""
    log_snr = (alpha_bar() / (1 - alpha_bar())).log()
    below = t.floor().long()
    value = log_snr[below] + (log_snr[below + 1] - log_snr[below]) * (t - below)
    return value.sigmoid().sqrt()[:, None], (-value).sigmoid().sqrt()[:, None]


def time_by_hand(sigma: float) -> float:
    """Where sqrt(1 / alpha_bar - 1) is sigma, by bisection."""
    low, high = 0.0, 998.9
    for _ in range(80):
        middle = (low + high) / 2
        a, s = at_time(torch.tensor([middle], dtype=torch.float64))
        low, high = (middle, high) if (s / a).item() < sigma else (low, middle)
    return low


def generated(student: torch.nn.Module, z: Tensor, label: Tensor, sigma: float = 2.5) -> Tensor:
    t = torch.full((len(z),), time_by_hand(sigma), dtype=torch.float64)
    a, s = at_time(t)
    return (s * z - s * student(s * z, t, {"label": label})) / a


def x0_by_hand(network: torch.nn.Module, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
    a, s = at_time(t)
    return (x_t - s * network(x_t, t, {"label": label})) / a


def gradients(nets: SimpleNamespace, role: str) -> list[Tensor | None]:
    return [p.grad for p in getattr(nets, role).network.parameters()]


def run_update(
    method: ScoreForgetting, nets: SimpleNamespace, index: int, count: int, rows: dict[str, Tensor] | None = None
) -> list[list[Tensor]]:
    """The losses of one update, backward each; what each has drawn. Only the update's role learns. rows: of the batch, beside x."""
    update = list(method.updates(Clock(0, count, count)))[index]
    for role in ("teacher", "fake_score", "student"):
        getattr(nets, role).network.requires_grad_(role == update.role)
    recorders = []
    for loss in update.losses:
        recorders.append(Recorder(count))
        batch = {"x": torch.zeros(count, 2, dtype=torch.float64), **(rows or {})}
        loss(nets, batch, recorders[-1]).value.backward()  # type: ignore[arg-type]
    return [recorder.draws for recorder in recorders]


def remaining_by_hand(u: Tensor) -> Tensor:
    """Of the classes 0, 1, 2 with 1 forgotten."""
    return torch.where(u < 0.5, 0, 2)


def test_the_times_are_those_of_the_noise_levels() -> None:
    """On DDPM's schedule, near the timesteps 38, 440 and 711 of the code release."""
    count = 4000
    method = method_of()
    t = method._times(noise_of(count), PATH)
    assert (t.min().item(), t.max().item()) == pytest.approx((time_by_hand(0.137), time_by_hand(13.0)), abs=0.5)
    assert time_by_hand(2.5) == pytest.approx(440, abs=1) and time_by_hand(0.137) == pytest.approx(38, abs=1)
    assert t.mean().item() == pytest.approx((time_by_hand(0.137) + time_by_hand(13.0)) / 2, abs=15)
    flow = method._times(noise_of(count), RectifiedFlow())
    assert (flow.min().item(), flow.max().item()) == pytest.approx((0.137 / 1.137, 13 / 14), abs=1e-3)


@pytest.mark.parametrize("sigma", [2.5, 1.5])
def test_the_fake_score_step_is_the_one_computed_by_hand(sigma: float) -> None:
    count, method, nets = 32, method_of(mu=0.3, lam=0.7, sigma=sigma), nets_of()
    remain, forget = run_update(method, nets, 0, count)
    found = gradients(nets, "fake_score")
    assert all(g is None for role in ("teacher", "student") for g in gradients(nets, role))
    nets.fake_score.network.zero_grad(set_to_none=True)
    fake, student = nets.fake_score.network, nets.student.network
    total = torch.zeros((), dtype=torch.float64)
    for weight, label, (z, t, eps) in (
        (1.0, remaining_by_hand(remain[0]), remain[1:]),
        (0.3, torch.ones(count, dtype=torch.int64), forget),
    ):
        a, s = at_time(t)
        x = generated(student, z, label, sigma).detach()
        total = total + weight * (fake(a * x + s * eps, t, {"label": label}) - eps).square().sum(1).mean()
    total.backward()
    for ours, theirs in zip(found, gradients(nets, "fake_score"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # times are drawn as float32


def test_what_the_student_draws_for_the_fake_score_holds_no_gradient() -> None:
    nets, method = nets_of(dtype=torch.float32), method_of()
    for loss in (method.fake_remain, method.fake_forget):
        loss(nets, batch_of(8), noise_of(8)).value.backward()
    assert all(g is None for g in gradients(nets, "student"))
    assert all(g is not None for g in gradients(nets, "fake_score"))


@pytest.mark.parametrize("alpha, guidance, sigma", [(1.2, 1.0, 2.5), (1.0, 3.0, 1.5)])
def test_the_student_step_is_the_one_computed_by_hand(alpha: float, guidance: float, sigma: float) -> None:
    count, method, nets = 32, method_of(mu=0.3, lam=0.7, alpha=alpha, guidance=guidance, sigma=sigma), nets_of()
    remain, forget = run_update(method, nets, 1, count)
    found = gradients(nets, "student")
    assert all(g is None for role in ("teacher", "fake_score") for g in gradients(nets, role))
    nets.student.network.zero_grad(set_to_none=True)
    teacher, fake, student = (nets.__dict__[role].network for role in ("teacher", "fake_score", "student"))
    total = torch.zeros((), dtype=torch.float64)
    kept, lost = remaining_by_hand(remain[0]), torch.ones(count, dtype=torch.int64)
    for weight, label, asked, (z, t, eps) in ((1.0, kept, kept, remain[1:]), (0.7, lost, torch.zeros_like(lost), forget[1:])):
        a, s = at_time(t)
        x_g = generated(student, z, label, sigma)
        x_t = a * x_g + s * eps
        null = x0_by_hand(teacher, x_t, t, torch.full((count,), -1))
        y = null + guidance * (x0_by_hand(teacher, x_t, t, asked) - null)
        d = y - x0_by_hand(fake, x_t, t, label)
        omega = (y - x_g).abs().mean(1, keepdim=True).detach()
        total = total + weight * (d * (y - x_g - alpha * d) / omega).sum(1).mean()
    total.backward()
    for ours, theirs in zip(found, gradients(nets, "student"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


# --- prompts ----------------------------------------------------------------------------------------------------------------


def prompted(**settings: Any) -> ScoreForgetting:
    method = ScoreForgetting(**settings)
    method.check_data(Concepts(CaptionedPatches(), {"red": Concept(["red"], replace="blue")}))
    return method


def rows_of(count: int, **parts: int) -> dict[str, Tensor]:
    """What stays is 0 and 2 in turn; the entry of the condition that the tiny network reads is called label."""
    stays = {"condition/label": 2 * (torch.arange(count) % 2)}
    return stays | {f"{part}/condition/label": torch.full((count,), value) for part, value in parts.items()}


def guided_by_hand(network: torch.nn.Module, x_t: Tensor, t: Tensor, label: Tensor, weight: float, null: int = -1) -> Tensor:
    without = x0_by_hand(network, x_t, t, torch.full_like(label, null))
    return without + weight * (x0_by_hand(network, x_t, t, label) - without)


@pytest.mark.parametrize("negative", [None, 2])
def test_the_student_step_on_prompts_is_the_one_computed_by_hand(negative: int | None) -> None:
    """Teacher and fake score guided; a negative prompt stands for the teacher's empty one in the forget term alone."""
    count, method, nets = 32, prompted(lam=0.7, guidance=3.0, fake_guidance=2.0, condition_dropout=0.1), nets_of()
    rows = rows_of(count, forget=1, override=0, **({} if negative is None else {"negative": negative}))
    remain, forget = run_update(method, nets, 1, count, rows)
    found = gradients(nets, "student")
    nets.student.network.zero_grad(set_to_none=True)
    teacher, fake, student = (nets.__dict__[role].network for role in ("teacher", "fake_score", "student"))
    total = torch.zeros((), dtype=torch.float64)
    kept, lost = rows["condition/label"], torch.ones(count, dtype=torch.int64)
    for weight, label, asked, null, (z, t, eps) in (
        (1.0, kept, kept, -1, remain),
        (0.7, lost, torch.zeros_like(lost), -1 if negative is None else negative, forget),
    ):
        a, s = at_time(t)
        x_g = generated(student, z, label)
        x_t = a * x_g + s * eps
        y = guided_by_hand(teacher, x_t, t, asked, 3.0, null)
        d = y - guided_by_hand(fake, x_t, t, label, 2.0)
        omega = (y - x_g).abs().mean(1, keepdim=True).detach()
        total = total + weight * (d * (y - x_g - 1.2 * d) / omega).sum(1).mean()
    total.backward()
    for ours, theirs in zip(found, gradients(nets, "student"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_the_fake_score_step_on_prompts_learns_through_its_guidance() -> None:
    """Rows that are dropped are drawn for their prompt and denoised without it."""
    count, method, nets = 32, prompted(mu=0.3, guidance=3.0, fake_guidance=2.0, condition_dropout=0.4), nets_of()
    rows = rows_of(count, forget=1, override=0)
    drawn = run_update(method, nets, 0, count, rows)
    found = gradients(nets, "fake_score")
    nets.fake_score.network.zero_grad(set_to_none=True)
    fake, student = nets.fake_score.network, nets.student.network
    total = torch.zeros((), dtype=torch.float64)
    for weight, label, (z, t, eps, dropped) in zip((1.0, 0.3), (rows["condition/label"], torch.ones(count, dtype=torch.int64)), drawn):
        assert 0 < dropped.sum() < count
        a, s = at_time(t)
        x_t = a * generated(student, z, label).detach() + s * eps
        guided = guided_by_hand(fake, x_t, t, label.where(~dropped, -1), 2.0)
        total = total + weight * ((x_t - a * guided) / s - eps).square().sum(1).mean()
    total.backward()
    for ours, theirs in zip(found, gradients(nets, "fake_score"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "settings, key, said",
    [
        ({"forget": 1}, "forget", "the data set `concepts` says what is forgotten"),
        ({"prior": [1.0]}, "prior", "the data set `concepts` says what is forgotten"),
        ({"override": 2}, "override", "the rules of the data set `concepts` say what is drawn instead"),
        ({"fake_guidance": 2.0}, "condition_dropout", "a guided fake score needs rows without condition"),
    ],
)
def test_what_prompts_say_already_is_refused(settings: dict[str, Any], key: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        prompted(**settings)
    assert raised.value.key == key


def test_without_prompts_the_class_is_named_and_images_are_needed_by_others() -> None:
    with pytest.raises(ConfigError, match="name the class to forget, or take the data set `concepts`"):
        ScoreForgetting().check_data(Rings())
    with pytest.raises(ValueError, match="npo learns from images and their classes, not from prompts alone; take sfd or esd"):
        NegativePreference().check_data(Concepts(CaptionedPatches(), {"red": Concept(["red"], replace="blue")}))


# --- order and roles --------------------------------------------------------------------------------------------------------


def test_the_fake_score_goes_first_and_terms_are_apart() -> None:
    updates = list(method_of().updates(Clock(0, 8, 80)))
    assert [(update.role, len(update.losses)) for update in updates] == [("fake_score", 2), ("student", 2)]
    assert ScoreForgetting.generator == "student" and method_of(sigma=3.0).own_sampler() == OneStep(sigma=3.0)
    with pytest.raises(ValueError, match="leave the sampler out"):
        method_of(sigma=3.0).check_sampler(OneStep())


def test_the_judge_chooses_the_override() -> None:
    """It sees the fake score's predictions at the forgotten label, in [-1, 1], and never answers with the forgotten class."""
    seen: list[Tensor] = []

    def judge(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.tensor([[-3.0, 9.0, -1.0]]).repeat(len(x), 1)  # the forgotten class is the likeliest, then the last

    count, method = 16, method_of(override="classifier")
    assert isinstance(method.roles["judge"], Frozen) and method.roles["judge"].classifier and "judge" not in method_of().roles
    nets = nets_of(judge=judge)
    run_update(method, nets, 1, count)
    labels = [label for label in nets.teacher.network.seen if label is not None]
    assert labels[-1].tolist() == [2] * count and nets.fake_score.network.seen[-1].tolist() == [1] * count
    assert len(seen) == 1 and not seen[0].requires_grad and seen[0].abs().max() <= 1


def test_no_pixel_of_the_batch_is_used() -> None:
    values = []
    for batch in (batch_of(8), {key: value * 0 for key, value in batch_of(8).items()}):
        nets = nets_of(dtype=torch.float32)
        values.append([loss(nets, batch, noise_of(8)).value for update in method_of().updates(Clock(0, 8, 8)) for loss in update.losses])
    assert torch.equal(torch.stack(values[0]), torch.stack(values[1]))
    assert len({value.item() for value in values[0]}) == 4


# --- as a configuration -----------------------------------------------------------------------------------------------------


def run_of(method: dict[str, Any], **roles: Any) -> RunConfig:
    settings = {"method": {"name": "sfd", "forget": 1, **method}, "data": "rings", "model": "mlp", "training": {"samples": 64}}
    return parse_run(Document({**settings, "roles": roles}, "run.yaml"))


TEACHER = {"teacher": {"weights": "runs/teacher"}}


@pytest.mark.parametrize(
    "method, roles, said",
    [
        ({}, {}, r"run.yaml: roles.teacher.weights: sfd needs the weights of its teacher; name a run's directory"),
        ({"override": 1}, TEACHER, r"run.yaml: method.override: it is the class to forget; name another one, or uniform"),
        ({"forget": 3}, TEACHER, r"run.yaml: method.forget: there is no class 3; the classes are rings 0, rings 1, rings 2 \(0 to 2\)"),
        ({"override": "classifier"}, TEACHER, r"run.yaml: roles.judge.weights: sfd needs the weights of its judge"),
    ],
)
def test_mistakes_are_told_as_the_configuration_loads(method: dict[str, Any], roles: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_of(method, **roles)


def test_a_run_draws_in_one_step_by_default() -> None:
    assert run_of({"sigma": 3.0}, **TEACHER).sampler == OneStep(sigma=3.0)
