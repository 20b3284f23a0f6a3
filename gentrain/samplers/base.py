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


def samplers_of(tokens: bool) -> str:
    """The names of those that draw tokens, or numbers, for messages."""
    return ", ".join(name for name, each in Sampler.available().items() if each.of_tokens == tokens)


@dataclass(kw_only=True)
class Sampler(Component, kind="sampler"):
    """Draws samples with a denoiser, in the caller's grad mode.

    Attributes:
        of_tokens: it draws with a `TokenModel` instead.
        keeps_inside: in a space with walls no sample leaves them.
        fresh_noise: it adds normal noise along the way, which is right in spaces whose prior is normal.
    """

    of_tokens: ClassVar[bool] = False
    keeps_inside: ClassVar[bool] = False
    fresh_noise: ClassVar[bool] = False

    steps: PositiveInt = option(20, "number of steps from noise to data")
    guidance: NonNegativeFloat = option(
        1.0, "classifier-free guidance weight w: null + w (conditional - null); 1 = conditional only", source="arXiv:2207.12598"
    )

    @property
    def other_law(self) -> str | None:
        """What makes its samples others than the model's own, such as "guidance 2"; None where nothing does."""
        return None if self.guidance == 1 else f"guidance {self.guidance:g}"

    @property
    def told(self) -> str:
        """How it draws, beside the numbers that its samples come to."""
        return f"{self.registered_name}, {self.steps} steps, guidance {self.guidance:g}"

    def sample(self, denoiser: Denoiser, shape: tuple[int, ...], noise: Noise, condition: Condition | None = None) -> Tensor:
        """Samples [B, ...] of `shape`, float32: `solve` from `start` times the first draws of the space's prior, decoded."""
        space = denoiser.path.space
        return space.decode(self.solve(denoiser, self.start(denoiser.path) * space.prior(noise, shape), noise, condition))

    def check(self, path: Path) -> None:
        """Raises ValueError, naming what would do, when it cannot walk the path back. The path's space need not be fitted."""
        if self.fresh_noise and not path.space.normal:
            raise ValueError(
                f"{self.registered_name} adds normal noise, which the prior of the space {path.space.registered_name} is not; take a "
                "sampler without fresh noise, or in the space dual set path.space.nu to .inf"
            )

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
