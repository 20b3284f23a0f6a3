"""esd: what is to be forgotten leads away from itself, and what remains is held to the original."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gentrain.config import ConfigError
from gentrain.data.concepts import Concept, Concepts
from gentrain.data.toys import Rings
from gentrain.methods.base import Clock
from gentrain.methods.esd import ErasedDiffusion, eps_error, partly_denoised
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.variance_preserving import VariancePreserving
from tests.methods.captioned import CaptionedPatches
from tests.methods.toy import TinyNetwork, batch_of, noise_of

PATH, COUNT = RectifiedFlow(), 32


class Double(Noise):
    """The same numbers in float64."""

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
        return super().normal(shape, dtype)

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
        return super().uniform(shape, low, high).double()


def double_noise(count: int = COUNT) -> Double:
    return Double(1, torch.arange(count))


def nets_of(dtype: torch.dtype = torch.float64) -> SimpleNamespace:
    model = TinyNetwork().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    return SimpleNamespace(original=Denoiser(TinyNetwork().to(dtype), PATH, "velocity"), model=Denoiser(model, PATH, "velocity"))


def of_class(**settings: Any) -> ErasedDiffusion:
    method = ErasedDiffusion(forget=1, **settings)
    method.check_data(Rings())
    return method


def of_concept(**settings: Any) -> ErasedDiffusion:
    method = ErasedDiffusion(**settings)
    method.check_data(Concepts(CaptionedPatches(), {"red": Concept(["red"], replace="blue")}))
    return method


def prompted_batch() -> dict[str, Tensor]:
    """Class 1 is to go, 2 replaces it, 0 is a prompt that stays; the entry of the condition that the tiny network reads is called label."""
    rows = {"condition/label": 0, "forget/condition/label": 1, "override/condition/label": 2}
    return {"x": torch.zeros(COUNT, 2, dtype=torch.float64)} | {key: torch.full((COUNT,), label) for key, label in rows.items()}


# --- by hand, on a rectified flow: x_t = (1 - t) x0 + t eps, so eps = x_t + (1 - t) velocity ---------------------------------------


def guided(denoiser: Denoiser, x: Tensor, t: Tensor, label: Tensor, weight: float, null: int = -1) -> Tensor:
    """The velocity null + weight (class - null)."""
    without, asked = (denoiser.velocity(x, t, {"label": each}) for each in (torch.full_like(label, null), label))
    return without + weight * (asked - without)


def walked(denoiser: Denoiser, z: Tensor, t: Tensor, label: Tensor, guidance: float, steps: int) -> Tensor:
    x = z
    with torch.no_grad():
        for step in range(steps):
            now, after = (1 + (t - 1) * (place / steps) for place in (step, step + 1))
            x = x + (after - now)[:, None] * guided(denoiser, x, now, label, guidance)
    return x


def forget_by_hand(nets: SimpleNamespace, noise: Noise, strength: float, null: int) -> Tensor:
    t = noise.uniform((COUNT,), 0.02, 1.0)
    label = torch.ones(COUNT, dtype=torch.int64)
    x = walked(nets.model, noise.normal((COUNT, 2)), t, label, 3.0, 4)
    eps = x + (1 - t)[:, None] * nets.model.velocity(x, t, {"label": label})
    with torch.no_grad():
        surrogate, known = (x + (1 - t)[:, None] * nets.original.velocity(x, t, {"label": torch.full_like(label, k)}) for k in (null, 1))
    return (eps - (surrogate - strength * (known - surrogate))).square().sum() / (2 * COUNT)


def remain_by_hand(nets: SimpleNamespace, noise: Noise, label: Tensor) -> Tensor:
    t = noise.uniform((COUNT,), 0.02, 1.0)
    x = walked(nets.model, noise.normal((COUNT, 2)), t, label, 3.0, 4)
    eps = x + (1 - t)[:, None] * guided(nets.model, x, t, label, 3.0)
    with torch.no_grad():
        before = x + (1 - t)[:, None] * guided(nets.original, x, t, label, 3.0)
    return (eps - before).square().sum() / (2 * COUNT)


def assert_same_step(nets: SimpleNamespace, ours: Tensor, by_hand: Tensor) -> None:
    """In value and in the gradient of each parameter of the model; the original gets none."""
    torch.testing.assert_close(ours, by_hand, rtol=1e-10, atol=1e-12)
    parameters = list(nets.model.network.parameters())
    ours.backward()
    assert all(p.grad is None for p in nets.original.network.parameters())
    for p, expected in zip(parameters, torch.autograd.grad(by_hand, parameters), strict=True):
        assert p.grad is not None and p.grad.abs().max() > 1e-8
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("strength, surrogate", [(1.0, None), (0.5, None), (0.0, "replacement"), (0.7, "replacement")])
def test_the_forget_term_is_the_one_computed_by_hand(strength: float, surrogate: Any) -> None:
    nets, method = nets_of(), of_concept(strength=strength, surrogate=surrogate, steps=4)
    ours = method.forget_loss(nets, prompted_batch(), double_noise())
    assert_same_step(nets, ours.value, forget_by_hand(nets, double_noise(), strength, {None: -1, "replacement": 2}[surrogate]))


def test_the_remain_term_of_concepts_is_the_one_computed_by_hand() -> None:
    """Rows of what stays and of what replaces the concept, in turn as they fall."""
    nets, method, noise = nets_of(), of_concept(remain_weight=0.7, steps=4), double_noise()
    label = torch.where(noise.bernoulli(0.5, (COUNT,)), 2, 0)
    assert 8 < (label == 2).sum() < 24
    found = method.remain_loss(nets, prompted_batch(), double_noise())
    by_hand = remain_by_hand(nets, noise, label)
    assert found.logs["remain"].item() == pytest.approx(by_hand.item(), rel=1e-10)
    assert_same_step(nets, found.value, 0.7 * by_hand)


def test_the_remain_term_of_a_class_is_the_one_computed_by_hand() -> None:
    """Of the others by the prior: three in four of class 2."""
    nets, method, noise = nets_of(), of_class(prior=[1.0, 5.0, 3.0], steps=4), double_noise()
    label = torch.where(noise.uniform((COUNT,)) < 0.25, 0, 2)
    found = method.remain_loss(nets, {"x": torch.zeros(COUNT, 2, dtype=torch.float64)}, double_noise())
    assert_same_step(nets, found.value, remain_by_hand(nets, noise, label))


@pytest.mark.parametrize("path, prediction", [(PATH, "velocity"), (VariancePreserving(), "v"), (VariancePreserving(), "x0")])
def test_an_error_of_x0_is_one_of_eps(path: Path, prediction: Any) -> None:
    t = torch.linspace(0.2, 0.8, 5, dtype=torch.float64) * path.t_max
    x_t = torch.randn(5, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, other = (Denoiser(lambda x, t, c, k=k: k * x + 0.1, path, prediction) for k in (0.3, -0.8))
    expected = (one.eps(x_t, t) - other.eps(x_t, t)).square().sum() / x_t.numel()
    torch.testing.assert_close(eps_error(path, t, one.x0(x_t, t), other.x0(x_t, t)), expected)


def test_without_weight_nothing_is_held() -> None:
    """The paper's loss."""
    losses = {weight: next(iter(of_class(remain_weight=weight).updates(Clock(0, 8, 80)))).losses for weight in (0.0, 1.0)}
    assert [len(each) for each in losses.values()] == [1, 2]
    assert losses[0.0][0].__name__ == "forget_loss"


def test_what_is_as_the_original_costs_nothing_to_hold() -> None:
    nets = nets_of()
    nets.model = nets.original
    assert of_class().remain_loss(nets, batch_of(8), noise_of(8)).value == 0
    assert of_class().forget_loss(nets, batch_of(8), noise_of(8)).value > 1e-4


def test_only_concepts_have_a_replacement() -> None:
    with pytest.raises(ConfigError, match="only the data set `concepts` has rules for it; leave it out") as raised:
        of_class(surrogate="replacement")
    assert raised.value.key == "surrogate"


# --- the walk -------------------------------------------------------------------------------------------------------------------------


def velocity_by_label(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    return torch.where(condition["label"] < 0, 2.0, 1.0)[:, None].expand_as(x)


def test_esd_leads_away_from_the_class() -> None:
    """Original velocities: 1 with the class, 2 without. The target with strength 0.5 is 2 - 0.5 (1 - 2) = 2.5, wherever x_t is."""
    original = Denoiser(velocity_by_label, PATH, "velocity")
    for velocity, expected in ((2.5, 0.0), (2.0, 0.25)):
        model = Denoiser(lambda x, t, c, v=velocity: torch.full_like(x, v), PATH, "velocity")
        method, noise = of_class(strength=0.5), noise_of(64)
        found = method.forget_loss(SimpleNamespace(original=original, model=model), batch_of(64), noise).value.item()
        t = noise_of(64).uniform((64,), 0.02, 1.0)  # the first draw
        # the error of eps is (1 - t) times that of the velocity
        assert found == pytest.approx(expected * (1 - t).square().mean().item(), rel=1e-4, abs=1e-9)


def test_esd_walks_with_the_model_itself() -> None:
    for number in range(2):
        nets, method = nets_of(torch.float32), of_class(steps=4)
        next(iter(method.updates(Clock(0, 8, 80)))).losses[number](nets, {"x": torch.zeros(8, 2)}, noise_of(8))
        assert (len(nets.model.network.seen), len(nets.original.network.seen)) == (5, 1)  # four steps and the loss; the target


def test_esd_asks_for_the_class_whatever_the_batch_holds() -> None:
    nets = nets_of(torch.float32)
    of_class().forget_loss(nets, {"x": torch.zeros(8, 2)}, noise_of(8))
    assert nets.model.network.seen[-1].tolist() == [1] * 8
    assert nets.original.network.seen[-1].tolist() == [1] * 8 + [-1] * 8


def test_partly_denoised_follows_the_flow() -> None:
    """Velocities of 1 with the class and 2 without: guided by 3 that is 2 + 3 (1 - 2) = -1: x at time t is x(1) + (t - 1) (-1)."""
    denoiser = Denoiser(velocity_by_label, PATH, "velocity")
    x, t = torch.zeros(4, 2), torch.tensor([0.1, 0.4, 0.7, 1.0])
    found = partly_denoised(denoiser, x, t, 3, {"label": torch.ones(4, dtype=torch.int64)}, 3.0)
    torch.testing.assert_close(found, (1 - t)[:, None].expand(4, 2))
