"""Mirror flow matching: flow matching in the mirror image of a convex set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gentrain.config import option, register
from gentrain.methods.base import Batch, Loss, Nets, weighed
from gentrain.methods.flow_matching import FlowMatching, flow_matching_loss
from gentrain.methods.matching import loss_by_noise_level, noised
from gentrain.noise import Noise
from gentrain.paths.base import Path, TimeLaw
from gentrain.paths.dual import Dual
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.times import Uniform


def tail_weight(x_t: Tensor, nu: float) -> Tensor:
    """1 / (1 + |x_t|^2 / (D nu)), D the number of coordinates: [B, ...] -> [B].

    A weight of the squared error that depends on x_t alone leaves the best velocity, E[eps - z | x_t], where it is.
    """
    return 1 / (1 + x_t.square().flatten(1).mean(1) / nu)


@register("mirror_flow")
@dataclass
class MirrorFlow(FlowMatching):
    """Mirror flow matching (arXiv:2510.08929): flow matching from a Student-t prior to the mirror map of the data.

    The mirror map and the prior belong to the path's space `dual`, which works under any method; this one is the paper's combination.

    A Student-t prior of nu <= 4 has no finite fourth moment, so that the gradient of the paper's squared error has no finite variance;
    the weighting "tails" then counts far points less.
    """

    weighting: Literal["tails", "none"] = option("tails", "of the squared error where nu <= 4: 1 / (1 + |x_t|^2 / (D nu)), or none")
    times: TimeLaw = option(Uniform, "law of the training times", source="arXiv:2510.08929, section 4")

    def check(self, path: Path) -> None:
        if not isinstance(path.space, Dual) or not isinstance(path, RectifiedFlow):
            raise ValueError("mirror_flow needs the path rectified_flow in a mirror image; set path.space to dual with a domain")

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        path = nets.model.path
        sample = noised(batch, noise, path, self.times, self.label_dropout)
        predicted = nets.model.velocity(sample.x_t, sample.t, sample.condition)
        loss = weighed(flow_matching_loss(predicted, path.velocity(sample.x0, sample.eps, sample.t)), batch)
        if self.weighting == "tails" and path.space.degrees <= 4:
            loss = loss * tail_weight(sample.x_t, path.space.degrees)
        # dual_square grows without bound where the barrier throws data far out: the sign of a kappa that is too large
        logs = loss_by_noise_level(loss, path.log_snr(sample.t)) | {"dual_square": sample.x0.square().mean()}
        return Loss(loss.mean(), logs)
