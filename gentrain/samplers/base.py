"""What a sampler is to the rest of gentrain."""

from __future__ import annotations

from torch import Tensor

from gentrain.config import Component
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise


class Sampler(Component, kind="sampler"):
    """Draws samples with a denoiser. `steps` and `guidance` are fields of every sampler."""

    steps: int
    guidance: float  # classifier-free guidance weight: null + guidance * (conditional - null); 1 = conditional only

    def sample(self, denoiser: Denoiser, shape: tuple[int, ...], noise: Noise, condition: Condition | None = None) -> Tensor:
        """Samples [B, ...] of `shape`; starts from sigma(t_max) times noise and draws whatever else it needs from `noise`."""
        raise NotImplementedError
