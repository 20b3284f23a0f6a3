"""Sampling from consistency models."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import PositiveInt
from torch import Tensor

from gentrain.config import option, register
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.samplers.base import Sampler
from gentrain.samplers.guidance import guided_x0


@register("consistency")
@dataclass
class Consistency(Sampler):
    """To clean data in one network call; each further step noises them to the next time and goes again (arXiv:2303.01469, algorithm 1).

    In a space with walls, clean data that lie outside are moved to the nearest point inside. A student of a guided teacher needs no
    guidance here.
    """

    steps: PositiveInt = option(1, "network calls")

    def solve(self, denoiser: Denoiser, x: Tensor, noise: Noise, condition: Condition | None = None) -> Tensor:
        path = denoiser.path
        times = path.sampling_times(self.steps)
        for step, t in enumerate(times.tolist()):
            if step > 0:
                x = path.perturb(x, path.draw_eps(noise, tuple(x.shape)), x.new_full((len(x),), t))
            x = guided_x0(denoiser, x, t, condition, self.guidance)
            if path.space.bounds is not None:
                x = path.space.bounds.project(x)
        return x
