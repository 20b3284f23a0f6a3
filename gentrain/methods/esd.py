"""Erased stable diffusion: the model is taught to answer the class as it would with guidance away from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data
from gentrain.data.concepts import OVERRIDE
from gentrain.methods.base import Batch, Clock, Frozen, Loss, Nets, Role, Trained, Update, condition_of, part_of
from gentrain.methods.forgetting import Forgetting
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path, expand
from gentrain.samplers.flow_map import flow_step
from gentrain.samplers.guidance import guided_x0


def partly_denoised(denoiser: Denoiser, x: Tensor, t: Tensor, steps: int, condition: Condition | None, guidance: float) -> Tensor:
    """x [B, ...] at t_max brought to the times t [B] in `steps` equal steps along the guided flow: [B, ...]."""
    start = torch.full_like(t, denoiser.path.t_max)
    for step in range(steps):
        now, after = (start + (t - start) * (place / steps) for place in (step, step + 1))
        x = flow_step(denoiser.path, x, guided_x0(denoiser, x, now, condition, guidance), now, after)
    return x


def eps_error(path: Path, t: Tensor, x0: Tensor, target: Tensor) -> Tensor:
    """Mean over all entries of the squared difference in eps, alpha / sigma times that of the x0 given: [B, ...] at times t [B] -> []."""
    return (expand(path.alpha(t) / path.sigma(t), x0) * (x0 - target)).square().mean()


@register("esd")
@dataclass
class ErasedDiffusion(Forgetting):
    """Erased stable diffusion (arXiv:2303.07345): a multistep model whose class, or prompts, lead away from themselves. It needs no data.

    Trained where the model's own samples pass, at x_t that it has denoised part of the way itself. A second term, not in the paper, holds
    it to the original on what remains (the latent anchoring of arXiv:2312.16145): the other classes by the prior; of the data set
    `concepts` on half of the rows what replaces the concept, which suffers first, on the others prompts that name none. With the
    surrogate `replacement` and strength 0 a concept becomes what replaces it (concept ablation, arXiv:2303.13516).

    roles.original.weights names the run of the model.
    """

    roles: ClassVar[dict[str, Role]] = {"original": Frozen(given=True), "model": Trained(init="original", ema=True)}
    generator: ClassVar[str | None] = "model"

    takes_concepts: ClassVar[bool] = True

    strength: NonNegativeFloat = option(
        1.0, "of the guidance away from the class: surrogate - strength (class - surrogate)", source="eq. 7"
    )
    surrogate: Literal["replacement"] | None = option(
        None, "what is answered instead: what the concepts' rules draw; null = the null class", source="arXiv:2312.16145"
    )
    remain_weight: NonNegativeFloat = option(
        1.0, "of the term that holds what remains; 0 = none, as in the paper", source="arXiv:2312.16145"
    )
    guidance: NonNegativeFloat = option(3.0, "of the samples that it is trained on", source="arXiv:2303.07345, code release")
    steps: PositiveInt = option(5, "of the way from noise to the time that is trained")

    @property
    def reads_data(self) -> bool:
        return False

    def check_data(self, data: Data) -> None:
        super().check_data(data)
        if self.surrogate == "replacement" and not self.prompted:
            raise ConfigError("only the data set `concepts` has rules for it; leave it out", key="surrogate")

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("model", self.forget_loss, *([self.remain_loss] if self.remain_weight else []))

    def forget_loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        asked, path = self.to_forget(batch, noise), nets.model.path
        x_t, t = self._walked(nets, batch, noise, asked)
        surrogate = condition_of(part_of(batch, OVERRIDE)) if self.surrogate == "replacement" else None
        with torch.no_grad():
            target = guided_x0(nets.original, x_t, t, asked, -self.strength, surrogate)
        loss = eps_error(path, t, nets.model.x0(x_t, t, asked), target)
        return Loss(loss, {"forget": loss.detach()})

    def remain_loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        """Between the guided predictions: what is drawn stays, and the null class with it."""
        asked, path = self._to_remain(batch, noise), nets.model.path
        x_t, t = self._walked(nets, batch, noise, asked)
        with torch.no_grad():
            target = guided_x0(nets.original, x_t, t, asked, self.guidance)
        loss = eps_error(path, t, guided_x0(nets.model, x_t, t, asked, self.guidance), target)
        return Loss(self.remain_weight * loss, {"remain": loss.detach()})

    def _walked(self, nets: Nets, batch: Batch, noise: Noise, asked: Condition | None) -> tuple[Tensor, Tensor]:
        """x_t [B, ...] that the model has made of noise in guided steps, and t [B], uniform over the path but for its last 2 %."""
        path, shape = nets.model.path, tuple(batch["x"].shape)
        t = noise.uniform((len(noise),), path.t_min + 0.02 * (path.t_max - path.t_min), path.t_max)
        with torch.no_grad():
            return partly_denoised(nets.model, path.start * path.draw_eps(noise, shape), t, self.steps, asked, self.guidance), t

    def _to_remain(self, batch: Batch, noise: Noise) -> Condition | None:
        asked = self.draw_remaining(batch, noise)
        instead = condition_of(part_of(batch, OVERRIDE)) if self.prompted else None
        if asked is None or instead is None:
            return asked
        rows = noise.bernoulli(0.5, (len(noise),))
        return {key: torch.where(expand(rows, value), instead[key], value) for key, value in asked.items()}
