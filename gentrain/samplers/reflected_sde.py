"""The reverse of reflected diffusion as a stochastic process: predictor and corrector, both reflected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor

from gentrain.config import option, register
from gentrain.domains.base import Domain
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path
from gentrain.paths.inside import Inside
from gentrain.paths.reflected_heat import ReflectedHeat
from gentrain.samplers.base import Sampler
from gentrain.samplers.guidance import guided_x0


def bounds_of(path: Path) -> Domain:
    """The set that the path's coordinates must not leave. Raises ValueError where there is none."""
    require_walls(path)
    assert path.space.bounds is not None, "fit the space to its data first"
    return path.space.bounds


def require_walls(path: Path) -> None:
    """Raises ValueError where the path's space is not a set with walls."""
    if not isinstance(path.space, Inside):
        raise ValueError(f"the space {path.space.registered_name} has no walls to reflect at; take the sampler euler or heun")


@register("reflected_sde")
@dataclass
class ReflectedSDE(Sampler):
    """Reflected Euler-Maruyama steps of the reverse process (arXiv:2304.04740, section 4), each after reflected Langevin steps.

    A step from sigma to sigma' takes variance v = sigma^2 - sigma'^2 off the path: x + v score + sigma' / sigma sqrt(v) z, mirrored at the
    walls. The factor sigma' / sigma, which tends to 1 with finer steps, makes the step exact for a known x0 away from the walls: a Brownian
    bridge. Without it each state would have up to sigma^2 / sigma'^2 times the variance that the network expects. A Langevin step has
    size 2 (snr sigma)^2: that of the paper, 2 (snr |z| / |score|)^2 with norms averaged over a batch, where noise dominates; a sample must
    not depend on its neighbours, and a size that depends on x itself would bias the law. The last step goes to the path's lowest noise
    level, not to clean data: sigma_min is the blur that is left.
    """

    keeps_inside: ClassVar[bool] = True

    corrector_steps: NonNegativeInt = option(0, "Langevin steps before each step", source="arXiv:2011.13456, algorithm 2")
    snr: PositiveFloat = option(0.01, "signal-to-noise ratio of the Langevin steps", source="arXiv:2304.04740")

    def check(self, path: Path) -> None:
        if not isinstance(path, ReflectedHeat):
            raise ValueError(f"reflected_sde walks back reflected_heat only, not {path.registered_name}; reflected_ode walks back both")
        require_walls(path)

    def solve(self, denoiser: Denoiser, x: Tensor, noise: Noise, condition: Condition | None = None) -> Tensor:
        path = denoiser.path
        self.check(path)
        assert isinstance(path, ReflectedHeat)
        bounds, times = bounds_of(path), path.sampling_times(self.steps)
        sigma = [*path.sigma(times).tolist(), path.sigma_min]
        for step, t in enumerate(times.tolist()):
            for _ in range(self.corrector_steps):
                score, z = self._score(denoiser, x, t, sigma[step], condition), noise.normal(tuple(x.shape), x.dtype)
                size = 2 * (self.snr * sigma[step]) ** 2
                x = bounds.reflect(x + size * score + (2 * size) ** 0.5 * z, x)
            variance = sigma[step] ** 2 - sigma[step + 1] ** 2
            score, z = self._score(denoiser, x, t, sigma[step], condition), noise.normal(tuple(x.shape), x.dtype)
            x = bounds.reflect(x + variance * score + variance**0.5 * sigma[step + 1] / sigma[step] * z, x)
        return x

    def _score(self, denoiser: Denoiser, x: Tensor, t: float, sigma: float, condition: Condition | None) -> Tensor:
        return (guided_x0(denoiser, x, t, condition, self.guidance) - x) / sigma**2
