import pytest
import torch
from torch import Tensor

from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.trigflow import TrigFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.ddim import DDIM
from tests.samplers.toy import SHAPE, convergence_orders, difference_from_diffusers, noise_for, toy_network

EVERY_PATH = [RectifiedFlow(), TrigFlow(), VarianceExploding(), VariancePreserving(), VariancePreserving(schedule="cosine")]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_equals_diffusers(schedule: str, prediction: str, eta: float) -> None:
    sampler, path, noise = DDIM(steps=20, guidance=2.0, eta=eta), VariancePreserving(schedule=schedule), noise_for()
    noise.normal(SHAPE)  # the one that makes the first x

    def step_arguments() -> dict:
        return {"eta": eta, "variance_noise": noise.normal(SHAPE)} if eta else {}

    scheduler = sampler.diffusers_scheduler(path, prediction)
    assert difference_from_diffusers(sampler, path, prediction, scheduler, step_arguments=step_arguments) < 1e-5


@pytest.mark.parametrize("path", EVERY_PATH[:4])
def test_converges_at_order_one(path: Path) -> None:
    orders = convergence_orders(DDIM, path, [32, 64, 128])
    assert all(0.9 < order < 1.1 for order in orders), orders


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("path", EVERY_PATH)
def test_fresh_noise_keeps_the_marginals_of_the_path(path: Path, eta: float) -> None:
    """If the data are one point and the denoiser knows it, x is N(alpha x0, sigma^2) at every time, whatever eta (tolerance 4 errors)."""
    count, seen = 50_000, []

    class Recorder(Denoiser):
        def x0(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
            seen.append((x_t, t[:1]))
            return torch.full_like(x_t, 0.3)

    noise, last = noise_for((count,)), torch.tensor([path.t_max], dtype=torch.float64)
    start = path.perturb(torch.full((count, 1), 0.3), noise.normal((count, 1), torch.float64), last)
    end = DDIM(steps=4, eta=eta).solve(Recorder(toy_network, path, "x0"), start, noise)
    assert len(seen) == 4
    for x, t in seen:
        alpha, sigma = path.alpha(t).item(), path.sigma(t).item()
        assert abs(x.mean().item() - 0.3 * alpha) < 4 * sigma / count**0.5
        assert abs(x.std().item() / sigma - 1) < 4 / (2 * count) ** 0.5
    torch.testing.assert_close(end, torch.full_like(end, 0.3))
    correlation = torch.corrcoef(torch.stack([seen[0][0].flatten(), seen[1][0].flatten()]))[0, 1].item()
    assert correlation > 0.999 if eta == 0 else correlation < 0.95


def test_no_scheduler_is_offered_where_none_fits() -> None:
    assert DDIM(steps=20).diffusers_scheduler(RectifiedFlow(), "velocity") is None
    assert DDIM(steps=30).diffusers_scheduler(VariancePreserving(), "eps") is None  # diffusers would take the wrong previous timestep
    assert DDIM(steps=20, spacing="karras").diffusers_scheduler(VariancePreserving(), "eps") is None
