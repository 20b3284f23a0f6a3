"""The methods beside which `sfd` is measured: gradient_ascent, npo; esd has a file of its own."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gentrain.data.toys import Rings
from gentrain.methods.base import Clock
from gentrain.methods.forgetting import Forgetting
from gentrain.methods.gradient_ascent import GradientAscent, ascent_loss
from gentrain.methods.npo import NegativePreference, npo_loss
from gentrain.models.denoiser import Denoiser
from gentrain.paths.rectified_flow import RectifiedFlow
from tests.methods.toy import TinyNetwork, batch_of, noise_of

PATH = RectifiedFlow()
METHODS: list[Any] = [GradientAscent, NegativePreference]


def nets_of() -> SimpleNamespace:
    model = TinyNetwork()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    return SimpleNamespace(original=Denoiser(TinyNetwork(), PATH, "velocity"), model=Denoiser(model, PATH, "velocity"))


def made(kind: Any, **settings: Any) -> Any:
    method: Forgetting = kind(forget=1, **settings)
    method.check_data(Rings())
    return method


@pytest.mark.parametrize("kind", METHODS)
def test_gradients_reach_the_model_only(kind: Any) -> None:
    nets = nets_of()
    (update,) = made(kind).updates(Clock(0, 8, 80))
    assert update.role == kind.generator == "model"
    update.losses[0](nets, batch_of(9), noise_of(9)).value.backward()
    assert all(p.grad is None for p in nets.original.network.parameters())
    assert all(p.grad is not None for p in nets.model.network.parameters())


def test_ascent_turns_the_sign_of_the_rows_to_forget() -> None:
    error, forgotten = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, True, False])
    assert ascent_loss(error, forgotten, 0.25).tolist() == [1.0, -0.5, 3.0]


def test_ascent_weighs_the_rows_by_their_labels() -> None:
    """Over weights 0 and 2 the loss falls by twice the mean error of the rows of class 1, of all rows."""
    batch = batch_of(30)
    kept, both = (made(GradientAscent, weight=weight).loss(nets_of(), batch, noise_of(30)) for weight in (0.0, 2.0))
    assert (kept.value - both.value).item() == pytest.approx(2 * kept.logs["error_forgotten"].item(), rel=1e-5)
    assert kept.logs["error_forgotten"] > 0


def test_npo_is_its_formula_and_its_gradient_fades() -> None:
    error = torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    before = torch.full((3,), 0.5, dtype=torch.float64)
    loss = npo_loss(error, before, 4.0)
    by_hand = [0.5 * math.log(1 + math.exp(-4 * (e - 0.5))) for e in (0.0, 0.5, 3.0)]
    assert loss.tolist() == pytest.approx(by_hand, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), error)
    # -2 sigmoid(-beta (error - before)): the pull of ascent, -1, where the errors are equal; gone where the class is forgotten
    assert gradient.tolist() == pytest.approx([-2 / (1 + math.exp(-2)), -1.0, -2 / (1 + math.exp(10))], rel=1e-12)


def test_npo_compares_with_the_original_on_the_rows_to_forget_alone() -> None:
    nets, batch = nets_of(), batch_of(30)
    nets.model = Denoiser(TinyNetwork(), PATH, "velocity")  # equal to the original: every row to forget costs 2 / beta log 2
    loss = made(NegativePreference, beta=4.0, weight=0.5).loss(nets, batch, noise_of(30))
    kept = made(GradientAscent, weight=0.0).loss(nets, batch, noise_of(30)).value
    share = (batch["label"] == 1).double().mean().item()
    assert loss.value.item() == pytest.approx(kept.item() + share * 0.5 * 0.5 * math.log(2), rel=1e-5)
    assert loss.logs["error_forgotten"] == 0


def test_npo_asks_the_original_what_the_error_was() -> None:
    """Of two models and one original: the row's push is by the difference, not by 0."""
    nets, batch = nets_of(), batch_of(30)
    loss = made(NegativePreference).loss(nets, batch, noise_of(30))
    assert loss.logs["error_forgotten"].abs() > 1e-4
