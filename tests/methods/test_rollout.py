from typing import Any

import pytest
import torch

from gentrain.config import ConfigError
from gentrain.methods.draft import DRaFT
from gentrain.methods.rollout import draws_of, first_jump, roll_out
from gentrain.models.denoiser import Denoiser
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.consistency import Consistency
from gentrain.samplers.ddim import DDIM
from gentrain.samplers.euler import Euler
from gentrain.samplers.lcm import LCM
from tests.methods.rewarded import PATH, Curved, Of, batch_of, noise_of

SAMPLERS = [Consistency(steps=1), Consistency(steps=3), LCM(steps=4), DDIM(steps=5, eta=1.0), DDIM(steps=4)]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("path", [PATH, RectifiedFlow()])
def test_a_roll_out_draws_what_the_sampler_does(sampler: Any, path: Any) -> None:
    denoiser, batch = Denoiser(Curved(0), path, "v"), batch_of(5, 3)
    expected = sampler.sample(denoiser, (5, 3), noise_of(5))
    *before, (_, last) = roll_out(sampler, denoiser, draws_of(sampler, batch, noise_of(5)), None)
    torch.testing.assert_close(last.x0, expected, rtol=1e-5, atol=1e-5)
    assert last.deviation == 0 and len(before) == sampler.steps - 1


def test_activations_are_made_again_in_the_backward() -> None:
    """Each jump's forward runs twice, with the noise that was stored: the gradient is that of a plain roll-out."""
    network, batch, sampler = Curved(0), batch_of(5, 3), LCM(steps=3)
    draws = draws_of(sampler, batch, noise_of(5))
    denoiser = Denoiser(network, PATH, "v")
    list(roll_out(sampler, denoiser, draws, None))[-1][1].x0.sum().backward()
    assert network.calls == 6
    found = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    x = sampler.start(PATH) * draws[0]
    for index in range(3):
        jump = sampler.jump(denoiser, x, index)
        x = jump.mean + jump.deviation * draws[index + 1] if index < 2 else jump.x0
    x.sum().backward()
    for a, p in zip(found, network.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)
    network.calls = 0
    with torch.no_grad():
        list(roll_out(sampler, denoiser, draws, None))
    assert network.calls == 3


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_what_is_cut_reaches_no_earlier_jump(cut: int) -> None:
    """By the number of jumps whose results have a gradient; rows may be cut at different jumps."""
    batch, sampler = batch_of(4, 3), LCM(steps=3)
    draws = draws_of(sampler, batch, noise_of(4))
    cuts = torch.tensor([0, 1, 2, cut])
    for how in (cut, cuts):
        rolled = list(roll_out(sampler, Denoiser(Curved(0), PATH, "v"), draws, None, cut=how))
        for _, jump in rolled[:-1]:
            jump.mean.retain_grad()
        rolled[-1][1].x0.square().sum().backward()
        for index, (_, jump) in enumerate(rolled[:-1]):
            reached = jump.mean.grad.abs().sum(1) > 0 if jump.mean.grad is not None else torch.zeros(4, dtype=torch.bool)
            assert reached.tolist() == ([index >= cut] * 4 if isinstance(how, int) else (cuts <= index).tolist())


def test_the_number_of_last_jumps() -> None:
    assert [first_jump(last, 4, noise_of(2)) for last in (None, 1, 3, 4, 9)] == [0, 3, 1, 0, 0]
    drawn = first_jump("random", 4, noise_of(400))
    assert isinstance(drawn, torch.Tensor) and set(drawn.tolist()) == {0, 1, 2, 3}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="euler does not say the law of its jumps; take consistency, lcm or ddim"):
        DRaFT(reward=Of(lambda x: x[:, 0]), sampler=Euler())

    class Black(Of):
        differentiable = False
        registered_name = "black"

    with pytest.raises(ConfigError, match="black has no gradient; take the method ddpo or zo_rank"):
        DRaFT(reward=Black(lambda x: x[:, 0]))
    from gentrain.paths.reflected_heat import ReflectedHeat

    with pytest.raises(ValueError, match="normal noise in free space"):
        DRaFT(reward=Of(lambda x: x[:, 0])).check(ReflectedHeat())
    with pytest.raises(ConfigError, match="sampler: 1000 steps between 1000 timesteps; take at most 999"):
        DRaFT(reward=Of(lambda x: x[:, 0]), sampler=Consistency(steps=1000)).check(VariancePreserving())
