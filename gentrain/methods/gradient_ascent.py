"""Gradient ascent: the denoising loss is descended on the classes that remain and ascended on the one to forget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pydantic import NonNegativeFloat
from torch import Tensor

from gentrain.config import option, register
from gentrain.methods.base import Batch, Clock, Loss, Nets, Role, Trained, Update
from gentrain.methods.forgetting import Forgetting
from gentrain.methods.matching import noised, output_error
from gentrain.noise import Noise
from gentrain.paths.base import TimeLaw
from gentrain.paths.times import Uniform


def ascent_loss(error: Tensor, forgotten: Tensor, weight: float) -> Tensor:
    """error of rows that remain, -weight * error of those to forget: [B], [B] bool -> [B]. It has no lower bound."""
    return error.where(~forgotten, -weight * error)


@register("gradient_ascent")
@dataclass
class GradientAscent(Forgetting):
    """The simplest way to forget (NegGrad, arXiv:1911.04933): a baseline, which needs the data and may break the model.

    The data hold the class to forget, by its labels. roles.model.weights names the run of the model.
    """

    roles: ClassVar[dict[str, Role]] = {"model": Trained(ema=True, given=True)}
    generator: ClassVar[str | None] = "model"
    guarded: ClassVar[tuple[str, ...]] = ()  # the loss falls without end, and the gradient grows

    weight: NonNegativeFloat = option(0.1, "of the ascent; 0 = fine-tuning on the classes that remain")
    times: TimeLaw = option(Uniform, "law of the training times")

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("model", self.loss)

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        sample = noised(batch, noise, nets.model.path, self.times, 0.0)
        error = output_error(nets.model, sample)
        forgotten = batch["label"] == self.forgotten
        return Loss(ascent_loss(error, forgotten, self.weight).mean(), {"error_forgotten": (error.detach() * forgotten).mean()})
