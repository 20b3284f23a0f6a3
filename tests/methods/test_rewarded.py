from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gentrain.config import ConfigError
from gentrain.data.base import Data
from gentrain.data.toys import Rings
from gentrain.extractors.label import Label
from gentrain.methods.base import Frozen, Method, Trained
from gentrain.methods.draft import DRaFT
from gentrain.methods.jdm import JDM
from gentrain.methods.noise_consistency import NoiseConsistency
from gentrain.methods.reward_guided_lcd import RewardGuidedLCD
from gentrain.methods.rewarded import score, with_judges
from gentrain.methods.rocm import ROCM
from gentrain.models.pretrained import Pretrained
from gentrain.models.towers import Towers
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.rewards.closed_form import Brightness
from gentrain.rewards.ensemble import Sum, Weighted
from gentrain.rewards.networks import ClassifierProbability, TowerSimilarity
from tests.models.pipelines import SIDE, stable_diffusion


@dataclass
class Images(Data):
    shape = (3, SIDE, SIDE)  # type: ignore[assignment]
    class_names = ("cat", "dog")  # type: ignore[assignment]
    registered_name = "images"


def test_a_rewards_networks_become_frozen_roles_that_must_be_given() -> None:
    towers, own = Towers(width=8), {"model": Trained()}
    judge = Frozen(given=True, denoiser=False, classifier=True)
    assert with_judges(own, reward=ClassifierProbability(role="j")) == {**own, "j": judge}
    assert with_judges(own, reward=TowerSimilarity(model=towers)) == {**own, "towers": Frozen(given=True, denoiser=False, model=towers)}
    assert with_judges(own, reward=Brightness(), control=None) == own == {"model": Trained()}
    assert with_judges(own, control=Label(), reward=ClassifierProbability()) == {**own, "judge": judge}  # one network for both


@pytest.mark.parametrize(
    ("make", "key", "role"),
    [
        (lambda: JDM(control=Label(role="student")), "control.role", "student"),
        (lambda: JDM(control=Label(), reward=TowerSimilarity(role="judge")), "reward.role", "judge"),
        (lambda: JDM(control=Label(role="consistency"), condition_at="noisy"), "control.role", "consistency"),
        (lambda: NoiseConsistency(control=Label(role="multiplier")), "control.role", "multiplier"),
        (lambda: DRaFT(reward=ClassifierProbability(role="model")), "reward.role", "model"),
        (lambda: RewardGuidedLCD(reward=ClassifierProbability(role="proxy"), through="proxy"), "reward.role", "proxy"),
        (lambda: ROCM(reward=Sum(rewards={"one": Weighted(ClassifierProbability(role="reference"))})), "reward", "reference"),
    ],
)
def test_no_network_of_a_reward_takes_the_place_of_another(make: Callable[[], Method], key: str, role: str) -> None:
    with pytest.raises(ConfigError) as mistake:
        make()
    assert mistake.value.key == key
    assert mistake.value.message == f"the role '{role}' is that of another network here; give `role` another name"


@pytest.mark.parametrize("method", [DRaFT, RewardGuidedLCD, partial(JDM, control=Label())])
def test_mistakes_are_about_the_methods_reward(method: Callable[..., Method]) -> None:
    with pytest.raises(ConfigError, match="it reads images with") as mistake:
        method(reward=Brightness()).check_data(Rings())
    assert mistake.value.key == "reward"
    with pytest.raises(ConfigError) as mistake:
        method(reward=ClassifierProbability(target="bird")).check_data(Images())
    assert mistake.value.key == "reward.target"


def test_the_gradient_passes_through_the_autoencoder(tmp_path: Path) -> None:
    """Against a difference along a direction, in the latents of a tiny pipeline."""
    codec = Pretrained(directory=str(stable_diffusion(tmp_path))).codec(Images())
    generator = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(2, *codec.shape, generator=generator) for _ in range(2))
    nets = SimpleNamespace(decode=codec.decode)

    def rewards(latents: torch.Tensor) -> torch.Tensor:
        return score(Brightness(), nets, RectifiedFlow(), latents, {})

    (gradient,) = torch.autograd.grad(rewards(x.requires_grad_()).sum(), x)
    with torch.no_grad():
        change = (rewards(x + 1e-2 * direction) - rewards(x - 1e-2 * direction)).sum() / 2e-2
    assert (gradient * direction).sum().item() == pytest.approx(change.item(), rel=1e-2)
    assert gradient.abs().max() > 0
