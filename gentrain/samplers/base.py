"""What a sampler is to the rest of gentrain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from gentrain.config import Component, option
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser, Prediction
from gentrain.noise import Noise
from gentrain.paths.base import Path


@dataclass(kw_only=True)
class Sampler(Component, kind="sampler"):
    """Draws samples with a denoiser, in the caller's grad mode. `of_tokens`: with a `TokenModel` instead."""

    of_tokens: ClassVar[bool] = False

    steps: PositiveInt = option(20, "number of steps from noise to data")
    guidance: NonNegativeFloat = option(
        1.0, "classifier-free guidance weight w: null + w (conditional - null); 1 = conditional only", source="arXiv:2207.12598"
    )

    @property
    def other_law(self) -> str | None:
        """What makes its samples others than the model's own, such as "guidance 2"; None where nothing does."""
        return None if self.guidance == 1 else f"guidance {self.guidance:g}"

    def sample(self, denoiser: Denoiser, shape: tuple[int, ...], noise: Noise, condition: Condition | None = None) -> Tensor:
        """Samples [B, ...] of `shape`, float32: `solve` from `start` times the first draws of the space's prior, decoded."""
        space = denoiser.path.space
        return space.decode(self.solve(denoiser, self.start(denoiser.path) * space.prior(noise, shape), noise, condition))

    def start(self, path: Path) -> float:
        """Standard deviation of x at t_max. The stock schedulers' init_noise_sigma (where they step x / alpha, divided by alpha)."""
        return path.start

    def solve(self, denoiser: Denoiser, x: Tensor, noise: Noise, condition: Condition | None = None) -> Tensor:
        """Clean data in the path's coordinates [B, ...] from x [B, ...] at t_max; draws from `noise` if the sampler is stochastic.

        Raises:
            ValueError: the steps or their spacing do not exist on the denoiser's path.
        """
        raise NotImplementedError

    def diffusers_scheduler(self, path: Path, prediction: Prediction) -> Any | None:
        """The diffusers scheduler that takes the same steps; None where there is none.

        Its `set_timesteps(steps)` gives this sampler's times, except for FlowMatchEulerDiscreteScheduler, which must be told:
        `set_timesteps(sigmas=[1, (steps - 1) / steps, ..., 1 / steps])`. Its timesteps are the path's `network_time`, except for the EDM
        schedulers, whose timesteps (log(sigma) / 4) are a thousandth of it and whose init_noise_sigma must be replaced by `start`.
        """
        return None
