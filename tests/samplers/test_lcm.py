from dataclasses import replace
from typing import Any

import pytest
import torch

from gentrain.config import ConfigError, Document, build
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.models.reading import read_on
from gentrain.paths.base import Path, convert_time
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.trigflow import TrigFlow
from gentrain.samplers.base import Sampler
from gentrain.samplers.lcm import LCM, consistent, lcm_sampling_timesteps, stable_diffusion_grid
from tests.samplers.toy import CONDITION, SHAPE, GaussianNetwork, noise_for, toy_network


def test_timesteps_are_those_of_the_code_release() -> None:
    assert lcm_sampling_timesteps(1, 50, 20).tolist() == [999]
    assert lcm_sampling_timesteps(2, 50, 20).tolist() == [999, 499]
    assert lcm_sampling_timesteps(4, 50, 20).tolist() == [999, 759, 499, 259]
    assert lcm_sampling_timesteps(8, 50, 20).tolist() == [999, 879, 759, 639, 499, 379, 259, 139]
    with pytest.raises(ValueError, match="51 steps of a student"):
        lcm_sampling_timesteps(51, 50, 20)
    with pytest.raises(ConfigError, match="21 steps of a student that was taught on 20 timesteps"):
        build(Sampler, Document({"name": "lcm", "steps": 21, "count": 20, "stride": 50}, "x.yaml"))  # type: ignore[type-abstract]


@pytest.mark.parametrize("path", [RectifiedFlow(), stable_diffusion_grid()])
def test_timesteps_that_are_none_of_the_paths_and_beginnings_that_are_not_noise_are_refused(path: Path) -> None:
    for good in (LCM(), LCM(count=20, stride=50), LCM(count=48)):
        good.check(path)
    with pytest.raises(ValueError, match="count 50 times stride 21 goes beyond the 1000 timesteps"):
        LCM(stride=21).check(path)
    with pytest.raises(ValueError, match=r"is 499, where 28% of x is data, .*; let count times stride be near 1000"):
        LCM(stride=10).check(path)


@pytest.mark.parametrize("count", [50, 20])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("prediction, stock", [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_equals_diffusers(
    prediction: Any, stock: str, steps: int, zero_terminal_snr: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if zero_terminal_snr and prediction == "eps":
        pytest.skip("pure noise says nothing of x0")
    from diffusers import LCMScheduler
    from diffusers.schedulers import scheduling_lcm

    noise = noise_for()
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda shape, **_: noise.normal(tuple(shape)))
    scheduler = LCMScheduler(prediction_type=stock, rescale_betas_zero_snr=zero_terminal_snr)
    scheduler.set_timesteps(steps, original_inference_steps=count)
    x = scheduler.init_noise_sigma * noise.normal(SHAPE)
    for t in scheduler.timesteps:
        x = scheduler.step(toy_network(x, torch.full((len(x),), float(t)), CONDITION), t, x).prev_sample
    path = replace(stable_diffusion_grid(), zero_terminal_snr=zero_terminal_snr)
    sampler = LCM(steps=steps, count=count, stride=1000 // count)
    ours = sampler.sample(Denoiser(toy_network, path, prediction), SHAPE, noise_for(), CONDITION)
    # theirs ends at alpha 0, ours at 2^-12, as other schedulers of diffusers do
    assert ((ours - x).abs().max() / x.abs().max()).item() < (2e-3 if zero_terminal_snr else 1e-5)


@pytest.mark.parametrize("path", [RectifiedFlow(), TrigFlow()])
def test_another_path_is_read_at_equal_signal_to_noise_ratio(path: Path) -> None:
    """The samples on its own path are those of the same denoiser read on the grid's path."""
    grid, gaussian, shape = stable_diffusion_grid(), GaussianNetwork(path).denoiser(), (50, 2)
    own = LCM(steps=3).sample(gaussian, shape, noise_for(shape))
    read = LCM(steps=3).sample(read_on(gaussian, grid), shape, noise_for(shape))
    torch.testing.assert_close(own, read, rtol=1e-4, atol=1e-4)
    t = convert_time(torch.tensor([999.0], dtype=torch.float64), grid, path)
    length = (path.alpha(t) ** 2 + path.sigma(t) ** 2).sqrt()
    assert LCM().start(path) == pytest.approx(length.item())
    assert LCM().start(grid) == pytest.approx(1.0)


@pytest.mark.parametrize("path", [RectifiedFlow(), stable_diffusion_grid()])
def test_at_timestep_0_a_point_is_its_own_end_but_for_the_paths_scale(path: Path) -> None:
    """z = x / sqrt(alpha^2 + sigma^2), as the grid's path has it; above 0 all but the x0 prediction counts for nothing."""
    grid, x, timesteps = stable_diffusion_grid(), torch.full((2, 3), 0.7), torch.tensor([0.0, 500.0])
    t = convert_time(timesteps, grid, path)
    found = consistent(path, grid, x, torch.ones(2, 3), timesteps)
    scale = (path.alpha(t[0]) ** 2 + path.sigma(t[0]) ** 2).sqrt()
    torch.testing.assert_close(found[0], 0.7 / scale.expand(3))
    torch.testing.assert_close(found[1], torch.ones(3), rtol=1e-4, atol=1e-4)


def test_the_guidance_goes_to_the_network_less_one() -> None:
    """diffusers embeds guidance_scale - 1 too; there is one call, of the conditional network."""
    seen: list[Condition] = []

    def network(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        seen.append(condition)
        return x

    LCM(steps=2, guidance=7.5).sample(Denoiser(network, stable_diffusion_grid(), "eps"), SHAPE, noise_for(), CONDITION)
    assert len(seen) == 2
    for condition in seen:
        assert torch.equal(condition["label"], CONDITION["label"]) and condition["guidance"].tolist() == [6.5] * 6
