"""Mirror flow matching: flow matching in the mirror image of a convex set."""

from __future__ import annotations

from dataclasses import dataclass

from gentrain.config import option, register
from gentrain.methods.base import Batch, Loss, Nets
from gentrain.methods.flow_matching import FlowMatching
from gentrain.noise import Noise
from gentrain.paths.base import Path, TimeLaw
from gentrain.paths.dual import Dual
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.times import Uniform


@register("mirror_flow")
@dataclass
class MirrorFlow(FlowMatching):
    """Mirror flow matching (arXiv:2510.08929): flow matching from a Student-t prior to the mirror map of the data.

    The mirror map and the prior belong to the path's space `dual`, which works under any method; this one is the paper's combination.
    """

    times: TimeLaw = option(Uniform, "law of the training times", source="arXiv:2510.08929, section 4")

    def check(self, path: Path) -> None:
        if not isinstance(path.space, Dual) or not isinstance(path, RectifiedFlow):
            raise ValueError("mirror_flow needs the path rectified_flow in a mirror image; set path.space to dual with a domain")

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        loss = super().loss(nets, batch, noise)
        # grows without bound where the barrier throws data far out: the sign of a kappa that is too large
        loss.logs["dual_square"] = nets.model.path.space.encode(batch["x"]).square().mean()
        return loss
