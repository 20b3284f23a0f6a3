"""Direct preference optimisation of diffusion and flow models: from pairs of a preferred and a rejected sample."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from pydantic import PositiveFloat
from torch import Tensor
from torch.nn.functional import softplus

from gentrain.config import Fraction, option, register
from gentrain.data.base import Data
from gentrain.data.preferences import Preferences
from gentrain.methods.base import Batch, Loss, Nets, part_of
from gentrain.methods.ddo import DiffusionRatio
from gentrain.noise import Noise


def dpo_loss(preferred_log_ratio: Tensor, rejected_log_ratio: Tensor, beta: float) -> Tensor:
    """mean softplus(-beta (r - r')): [B], [B] -> scalar (arXiv:2305.18290, eq. 7; of diffusion models arXiv:2311.12908, eq. 14).

    Only the difference of the two log-ratios counts: both may fall, as long as the rejected one's falls faster.
    """
    return softplus(-beta * (preferred_log_ratio - rejected_log_ratio)).mean()


@register("diffusion_dpo")
@dataclass
class DiffusionDPO(DiffusionRatio):
    """Diffusion-DPO (arXiv:2311.12908): the model comes to prefer what was preferred, held near its frozen beginning, the reference.

    Both samples of a pair meet the same time, noise and label. roles.reference.weights names the run that it continues, whose path,
    prediction, times and weighting are its own. beta contains the factor T of the paper, whose loss is a mean over T times.
    """

    beta: PositiveFloat = option(5.0, "scale of the log-ratio, which is a SUM over the sample's coordinates")
    label_dropout: Fraction = option(0.0, "probability that a pair's label becomes the null class")

    def check_data(self, data: Data) -> None:
        if not isinstance(data, Preferences):
            raise ValueError(f"diffusion_dpo learns from pairs, which {data.registered_name} has not; take the data set preferences")
        if data.voted:
            raise ValueError(f"diffusion_dpo takes the first of a pair for the preferred one, and {data.file} has votes; leave those out")

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        rejected_rows = {**batch, **part_of(batch, "rejected")}
        again = copy.copy(noise)  # which draws the same numbers
        preferred, rejected = self.ratio(nets, batch, noise), self.ratio(nets, rejected_rows, again)
        margin = (preferred.log_ratio - rejected.log_ratio).detach()
        logs = {
            "model_loss": preferred.loss.mean(),
            "reference_loss": preferred.reference_loss.mean(),
            "margin": margin.mean(),
            "preference_accuracy": (1 + margin.sign().mean()) / 2,
        }
        return Loss(dpo_loss(preferred.log_ratio, rejected.log_ratio, self.beta), logs)
