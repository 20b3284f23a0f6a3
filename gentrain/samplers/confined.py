"""What people do with a model that knows nothing of the set its samples belong to: baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from gentrain.config import option, register
from gentrain.domains.base import Domain
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path
from gentrain.samplers.base import Sampler
from gentrain.samplers.euler import Euler
from gentrain.samplers.guidance import guided_x0


class _Thresholded(Denoiser):
    """Its x0 prediction is the guided one, moved to the nearest point of the domain."""

    def __init__(self, denoiser: Denoiser, domain: Domain, guidance: float):
        super().__init__(denoiser.network, denoiser.path, denoiser.prediction)
        self.plain, self.domain, self.guidance = denoiser, domain, guidance

    def x0(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return self.domain.project(guided_x0(self.plain, x_t, t, condition, self.guidance))


@register("confined")
@dataclass
class Confined(Sampler):
    """Euler's samples of an unconstrained model, forced into a domain.

    "projection": each finished sample is moved to the nearest point. "thresholding": so is each step's guided x0 prediction
    (arXiv:2205.11487, section 2.3). "rejection": samples outside are drawn again. The first two pile mass up on the boundary; the last
    costs 1 / acceptance.
    """

    keeps_inside: ClassVar[bool] = True

    domain: Domain = option(help="the convex set")
    by: Literal["projection", "thresholding", "rejection"] = option("projection", "how samples are forced inside")
    attempts: PositiveInt = option(100, "rounds after which rejection gives up")

    def check(self, path: Path) -> None:
        Euler(steps=self.steps).check(path)

    def sample(self, denoiser: Denoiser, shape: tuple[int, ...], noise: Noise, condition: Condition | None = None) -> Tensor:
        """Raises ValueError when some samples were outside in all of `attempts` rounds."""
        self.domain.check_shape(shape[1:])
        euler = Euler(steps=self.steps, guidance=self.guidance)
        if self.by == "thresholding":
            euler, denoiser = Euler(steps=self.steps), _Thresholded(denoiser, self.domain, self.guidance)
        x = euler.sample(denoiser, shape, noise, condition)
        if self.by != "rejection":
            return self.domain.project(x)
        for _ in range(self.attempts - 1):
            inside = self.domain.contains(x)
            if bool(inside.all()):
                return x
            x = torch.where(inside.reshape(-1, *[1] * (x.ndim - 1)), x, euler.sample(denoiser, shape, noise, condition))
        if not bool(self.domain.contains(x).all()):
            raise ValueError(f"{int((~self.domain.contains(x)).sum())} of {len(x)} samples lay outside in all of {self.attempts} rounds")
        return x
