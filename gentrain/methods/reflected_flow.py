"""Reflected flow matching: flow matching whose prior lies in the data's convex set."""

from __future__ import annotations

from dataclasses import dataclass

from gentrain.config import option, register
from gentrain.methods.flow_matching import FlowMatching
from gentrain.paths.base import Path, TimeLaw
from gentrain.paths.inside import Inside
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.times import Uniform
from gentrain.samplers.base import Sampler
from gentrain.samplers.reflected_ode import ReflectedODE


@register("reflected_flow")
@dataclass
class ReflectedFlow(FlowMatching):
    """Reflected flow matching (arXiv:2405.16577): flow matching on straight lines between points of one convex set.

    The set being convex, no line touches its boundary, so that training is flow matching as it is. The boundary acts where samples are
    drawn: by the sampler `reflected_ode`, which mirrors steps that would leave.
    """

    times: TimeLaw = option(Uniform, "law of the training times", source="arXiv:2405.16577")

    def own_sampler(self) -> Sampler:
        return ReflectedODE()

    def check(self, path: Path) -> None:
        if not isinstance(path.space, Inside) or not isinstance(path, RectifiedFlow):
            raise ValueError("reflected_flow needs the path rectified_flow with both ends in one convex set; set path.space to inside")
