"""The probability flow inside a convex set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from gentrain.config import option, register
from gentrain.domains.base import Domain
from gentrain.domains.box import Box
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.reflected_heat import ReflectedHeat
from gentrain.samplers.ode import GridSampler, ProbabilityFlow
from gentrain.samplers.reflected_sde import bounds_of, require_walls


def bump(box: Box, x: Tensor) -> Tensor:
    """exp((4 - 1 / (u (1 - u))) / 200) of each coordinate's place u in the box, 1 at the centre and 0 at the walls
    (arXiv:2304.04740, section 4).

    x [B, ...] must be inside: beyond a wall the expression would grow without bound.
    """
    below, above = box.slack(x).chunk(2, 1)
    place = below * above / (below + above).square()
    return ((4 - 1 / place) / 200).exp().view_as(x)


@register("reflected_ode")
@dataclass
class ReflectedODE(GridSampler):
    """Euler's or Heun's steps down the probability flow of `reflected_heat` or of a rectified flow `inside` a set.

    walls "reflect": a step that would leave is mirrored (arXiv:2405.16577, section 3). Heun's correction starts where Euler's step ended,
    after its reflections, and takes the first slope mirrored at the same walls: otherwise its part normal to a wall would have the wrong
    sign. "bump" (boxes only): the slope is damped to 0 at the walls (arXiv:2304.04740, section 4), and what a finite step still carries
    past them is put back. The last step is Euler's.
    """

    keeps_inside: ClassVar[bool] = True

    order: Literal[1, 2] = option(2, "1 = Euler, one network call a step; 2 = Heun, two")
    walls: Literal["reflect", "bump"] = option("reflect", "what keeps samples inside")

    def check(self, path: Path) -> None:
        require_walls(path)
        if not isinstance(path, ReflectedHeat | RectifiedFlow):
            raise ValueError(
                f"reflected_ode walks back paths that stay inside, and {path.registered_name} leaves; take reflected_heat or rectified_flow"
            )
        bounds = path.space.bounds  # None before it is fitted to data that bring it
        if self.walls == "bump" and bounds is not None and not isinstance(bounds, Box):
            raise ValueError(f"the bump is made for boxes; on {bounds.registered_name} set walls: reflect")

    def solve(self, denoiser: Denoiser, x: Tensor, noise: Noise, condition: Condition | None = None) -> Tensor:
        self.check(denoiser.path)
        bounds, flow = bounds_of(denoiser.path), ProbabilityFlow(denoiser, self.grid(denoiser.path), condition, self.guidance)
        for step in range(self.steps):
            change = flow.u[step + 1] - flow.u[step]
            slope = self._slope(flow, bounds, x, step)
            x, mirrored = bounds.reflect_with_velocity(x + change * slope, slope, x)
            if self.order == 2 and step + 1 < self.steps:
                x = bounds.reflect(x + change / 2 * (self._slope(flow, bounds, x, step + 1) - mirrored), x)
        return x

    def _slope(self, flow: ProbabilityFlow, bounds: Domain, x: Tensor, step: int) -> Tensor:
        slope = flow.slope(x, step)
        if self.walls == "reflect":
            return slope
        assert isinstance(bounds, Box), "solve has checked it"
        return slope * bump(bounds, x)
