"""Erased stable diffusion: the model is taught to answer the class as it would with guidance away from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from gentrain.config import option, register
from gentrain.methods.base import Batch, Clock, Frozen, Loss, Nets, Role, Trained, Update
from gentrain.methods.forgetting import Forgetting
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import expand
from gentrain.samplers.flow_map import flow_step
from gentrain.samplers.guidance import guided_x0


def partly_denoised(denoiser: Denoiser, x: Tensor, t: Tensor, steps: int, condition: Condition | None, guidance: float) -> Tensor:
    """x [B, ...] at t_max brought to the times t [B] in `steps` equal steps along the guided flow: [B, ...]."""
    start = torch.full_like(t, denoiser.path.t_max)
    for step in range(steps):
        now, after = (start + (t - start) * (place / steps) for place in (step, step + 1))
        x = flow_step(denoiser.path, x, guided_x0(denoiser, x, now, condition, guidance), now, after)
    return x


@register("esd")
@dataclass
class ErasedDiffusion(Forgetting):
    """Erased stable diffusion (arXiv:2303.07345): a multistep model whose class, or prompts, lead away from themselves. It needs no data.

    Trained where the model's own samples of the class pass, at x_t that it has denoised half of the way itself. The whole network learns.
    roles.original.weights names the run of the model.
    """

    roles: ClassVar[dict[str, Role]] = {"original": Frozen(given=True), "model": Trained(init="original", ema=True)}
    generator: ClassVar[str | None] = "model"

    takes_concepts: ClassVar[bool] = True

    strength: NonNegativeFloat = option(1.0, "of the guidance away from the class: null - strength (class - null)", source="eq. 7")
    guidance: NonNegativeFloat = option(3.0, "of the samples that it is trained on", source="arXiv:2303.07345, code release")
    steps: PositiveInt = option(5, "of the way from noise to the time that is trained")

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("model", self.loss)

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        model, path = nets.model, nets.model.path
        shape, condition = tuple(batch["x"].shape), self.to_forget(batch, noise)
        t = noise.uniform((len(noise),), path.t_min + 0.02 * (path.t_max - path.t_min), path.t_max)
        with torch.no_grad():
            x_t = partly_denoised(model, path.start * path.draw_eps(noise, shape), t, self.steps, condition, self.guidance)
            target = guided_x0(nets.original, x_t, t, condition, -self.strength)
        # the error of eps is alpha / sigma times that of x0
        error = expand(path.alpha(t) / path.sigma(t), x_t) * (model.x0(x_t, t, condition) - target)
        return Loss(error.square().flatten(1).mean(1).mean())
