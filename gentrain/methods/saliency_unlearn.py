"""Saliency unlearning: the class is relabelled, and only the weights learn that it hangs on most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data
from gentrain.methods.base import Batch, Clock, Frozen, Loss, Nets, Role, Trained, Update
from gentrain.methods.forgetting import UNIFORM, Forgetting, draw_classes, override_weights
from gentrain.methods.matching import noised
from gentrain.noise import Noise
from gentrain.paths.base import TimeLaw
from gentrain.paths.times import Uniform

MASK = "mask.safetensors"  # what the stage `saliency` writes


def salient(gradients: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """True for the `share` of all weights with the largest gradients, in magnitude (arXiv:2310.12508, eq. 4), more where some are equal.

    One threshold for all tensors, so that layers may have more or fewer of them: name -> bool of the gradient's shape.
    """
    magnitudes = torch.cat([gradient.abs().flatten() for gradient in gradients.values()])
    threshold = magnitudes.kthvalue(len(magnitudes) - max(1, round(share * len(magnitudes))) + 1).values
    return {name: gradient.abs() >= threshold for name, gradient in gradients.items()}


@register("saliency_unlearn")
@dataclass(kw_only=True)
class SaliencyUnlearning(Forgetting):
    """Saliency unlearning (SalUn, arXiv:2310.12508): relabelling of the class, by the most salient weights alone. It needs the data.

    On rows of the class to forget the model learns what the original answers for another class at the same x_t; rows of the other classes
    are denoised as in training. Weights outside the mask stay as they are, bit for bit. roles.original.weights names the run of the model,
    `saliency` the stage that found the mask.
    """

    roles: ClassVar[dict[str, Role]] = {"original": Frozen(given=True), "model": Trained(init="original", ema=True)}
    generator: ClassVar[str | None] = "model"

    saliency: str = option(help="directory of a stage `saliency`, which says what weights learn")
    override: int | str = option(UNIFORM, "what the class is relabelled as: a class, or uniform over the others, drawn for each sample")
    weight: NonNegativeFloat = option(1.0, "of the rows to forget")
    times: TimeLaw = option(Uniform, "law of the training times")

    def check_data(self, data: Data) -> None:
        super().check_data(data)
        self.overrides = override_weights(self.override, data.class_names, self.forgotten)

    def learning(self, role: str) -> dict[str, Tensor]:
        path = Path(self.saliency) / MASK
        try:
            return {name: value.bool() for name, value in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); run a stage `saliency` first", key="method.saliency") from error

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("model", self.loss)

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        sample = noised(batch, noise, nets.model.path, self.times, 0.0)
        forgotten = batch["label"] == self.forgotten
        override = draw_classes(noise, len(noise), self.overrides)
        with torch.no_grad():
            relabelled = {**(sample.condition or {}), "label": override.where(forgotten, batch["label"])}
            answer = nets.original.raw(sample.x_t, sample.t, relabelled)
        rows = forgotten.reshape(-1, *[1] * (answer.ndim - 1))
        target = answer.where(rows, nets.model.target(sample.x0, sample.eps, sample.t))
        error = (nets.model.raw(sample.x_t, sample.t, sample.condition) - target).square().flatten(1).mean(1)
        loss = error * torch.where(forgotten, self.weight, 1.0)
        return Loss(loss.mean(), {"error_forgotten": (error.detach() * forgotten).mean()})
