import pytest
import torch
from torch import Tensor

from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.heun import Heun
from gentrain.samplers.restart import Restart
from tests.samplers.toy import GaussianNetwork, noise_for, toy_network

PATHS = [RectifiedFlow(), VarianceExploding(), VariancePreserving()]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.registered_name)
def test_noise_levels_are_those_of_the_path_before_and_after_each_restart(path: Path) -> None:
    """If the data are one point and the denoiser knows it, x is N(alpha x0, sigma^2) at every time (tolerance 4 errors)."""
    count, seen = 20_000, []

    class Recorder(Denoiser):
        def x0(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
            seen.append((x_t, t[:1]))
            return torch.full_like(x_t, 0.3)

    noise, last = noise_for((count,)), torch.tensor([path.t_max], dtype=torch.float64)
    start = path.perturb(torch.full((count, 1), 0.3), noise.normal((count, 1), torch.float64), last)
    sampler = Restart(steps=10, low=0.1, high=1.5, times=2, restart_steps=3)
    sampler.solve(Recorder(toy_network, path, "x0"), start, noise)
    assert len(seen) == 2 * 10 - 1 + 2 * 2 * 3
    levels = [(path.sigma(t) / path.alpha(t)).item() for _, t in seen]
    assert sum(abs(level - 1.5) < 1e-6 and last < 1 for level, last in zip(levels[1:], levels)) == 2  # thrown back twice
    for x, t in seen:
        alpha, sigma = path.alpha(t).item(), path.sigma(t).item()
        assert abs(x.mean().item() - 0.3 * alpha) < 4 * sigma / count**0.5
        assert abs(x.std().item() / sigma - 1) < 4 / (2 * count) ** 0.5


def test_restarts_draw_fresh_noise_and_forget_the_start() -> None:
    path, noise, count = VarianceExploding(), noise_for((2000,)), 2000
    gaussian = GaussianNetwork(path)
    x = path.start * noise.normal((count, 1), torch.float64)
    plain = Heun(steps=12).solve(gaussian.denoiser(), x, noise)
    again = Restart(steps=12, low=0.05, high=5.0, times=3, restart_steps=6).solve(gaussian.denoiser(), x, noise)
    assert abs(torch.corrcoef(torch.stack([plain.flatten(), x.flatten()]))[0, 1]) > 0.99
    assert abs(torch.corrcoef(torch.stack([plain.flatten(), again.flatten()]))[0, 1]) < 0.3
    assert abs(again.mean() - gaussian.mean) < 0.05 and abs(again.std() / gaussian.deviation - 1) < 0.12


def test_intervals_that_hold_no_step_are_refused() -> None:
    with pytest.raises(ValueError, match="must be below high"):
        Restart(low=0.5, high=0.5)
    denoiser = GaussianNetwork(RectifiedFlow()).denoiser()
    Restart().check(RectifiedFlow())
    with pytest.raises(ValueError, match="take more steps, or raise high"):
        Restart(steps=2, low=0.05, high=0.06).check(RectifiedFlow())
    with pytest.raises(ValueError, match="take more steps, or raise high"):
        Restart(steps=2, low=0.05, high=0.06).solve(denoiser, torch.zeros(3, 1), noise_for((3,)))
