"""Negative preference optimisation for denoisers: as gradient ascent, but the push fades once the class is forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn.functional import softplus

from gentrain.config import option, register
from gentrain.methods.base import Batch, Clock, Frozen, Loss, Nets, Role, Trained, Update
from gentrain.methods.forgetting import Forgetting
from gentrain.methods.matching import noised, output_error
from gentrain.noise import Noise
from gentrain.paths.base import TimeLaw
from gentrain.paths.times import Uniform


def npo_loss(error: Tensor, reference_error: Tensor, beta: float) -> Tensor:
    """2 / beta log(1 + exp(-beta (error - reference_error))) of each row: [B], [B] -> [B].

    (2 / beta) log(1 + (pi / pi_ref)^beta) (arXiv:2404.05868, eq. 3) with the log-likelihood ratio of the model to the reference replaced
    by what its denoising error is smaller, as for preferences in arXiv:2311.12908. Its gradient is that of ascent at first, and goes to 0
    as the error grows beyond the reference's by a few times 1 / beta.
    """
    return 2 / beta * softplus(-beta * (error - reference_error))


@register("npo")
@dataclass
class NegativePreference(Forgetting):
    """Negative preference optimisation (arXiv:2404.05868) on the diffusion surrogate of the likelihood: a baseline, which needs the data.

    The data hold the class to forget, by its labels; rows of the other classes are denoised as in training. roles.original.weights names
    the run of the model.
    """

    roles: ClassVar[dict[str, Role]] = {"original": Frozen(given=True), "model": Trained(init="original", ema=True)}
    generator: ClassVar[str | None] = "model"

    beta: PositiveFloat = option(10.0, "how soon the push fades", unit="1 / error")
    weight: NonNegativeFloat = option(0.5, "of the rows to forget")
    times: TimeLaw = option(Uniform, "law of the training times")

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("model", self.loss)

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        sample = noised(batch, noise, nets.model.path, self.times, 0.0)
        error = output_error(nets.model, sample)
        with torch.no_grad():
            before = output_error(nets.original, sample)
        forgotten = batch["label"] == self.forgotten
        loss = error.where(~forgotten, self.weight * npo_loss(error, before, self.beta))
        return Loss(loss.mean(), {"error_forgotten": ((error - before).detach() * forgotten).mean()})
