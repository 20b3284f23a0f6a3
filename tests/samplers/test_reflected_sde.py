import pytest
import torch

from gentrain.domains.box import Box
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.inside import Inside
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.samplers.reflected_sde import ReflectedSDE
from tests.samplers.reflected import ATOMS, WEIGHTS, atoms_denoiser

COUNT = 20_000


def draw(sampler: ReflectedSDE, denoiser: Denoiser, rows: torch.Tensor) -> torch.Tensor:
    return sampler.sample(denoiser, (len(rows), 1), Noise(1, rows))


@pytest.mark.parametrize("sampler", [ReflectedSDE(steps=50), ReflectedSDE(steps=100, corrector_steps=1, snr=0.2)])
def test_the_exact_score_gives_the_data(sampler: ReflectedSDE) -> None:
    """Each point gets its share, blurred by sigma_min and mirrored at the wall. Of 20,000 samples with 50 steps shares were off by 0.005 at
    most; by 0.040 where steps had the plain Euler-Maruyama noise, which 400 steps brought to 0.004. 0.0035 is one deviation of counting."""
    x = draw(sampler, atoms_denoiser(), torch.arange(COUNT))
    assert Box().contains(x).all()
    nearest = (x - ATOMS).abs().argmin(1)
    shares = torch.bincount(nearest, minlength=3) / COUNT
    assert (shares - WEIGHTS).abs().max() < 0.015
    spread = (x[:, 0] - ATOMS[nearest])[nearest == 1].std()
    assert 0.0095 < spread < 0.0106


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    sampler, denoiser = ReflectedSDE(steps=5, corrector_steps=2), atoms_denoiser()
    torch.testing.assert_close(draw(sampler, denoiser, torch.arange(8))[4:], draw(sampler, denoiser, torch.arange(4, 8)), rtol=0, atol=1e-6)


def test_uniform_data_whose_score_is_zero_stay_uniform() -> None:
    denoiser = Denoiser(lambda x, t, condition: torch.zeros_like(x), atoms_denoiser().path, "eps")
    x = draw(ReflectedSDE(steps=10, corrector_steps=1), denoiser, torch.arange(COUNT))
    assert Box().contains(x).all() and abs(x.mean() - 0.5) < 0.02 and abs(x.std() - 12**-0.5) < 0.01


def test_other_paths_are_refused() -> None:
    denoiser = Denoiser(lambda x, t, condition: x, RectifiedFlow(space=Inside(domain=Box())), "velocity")
    with pytest.raises(ValueError, match="reflected_ode walks back both"):
        draw(ReflectedSDE(), denoiser, torch.arange(3))
    with pytest.raises(ValueError, match="has no walls"):
        ReflectedSDE().solve(Denoiser(lambda x, t, condition: x, _free(), "eps"), torch.zeros(3, 1), Noise(0, torch.arange(3)))


def _free():
    from gentrain.paths.reflected_heat import ReflectedHeat
    from gentrain.paths.space import Free

    return ReflectedHeat(space=Free())
