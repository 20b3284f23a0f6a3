"""Latent consistency distillation: a student of a guided teacher, taught on a coarse grid of timesteps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from gentrain.config import Fraction, errors_about, option, register
from gentrain.data.base import Data
from gentrain.methods.base import Batch, Clock, Follow, Frozen, Loss, Method, Nets, Role, Trained, Update, condition_of
from gentrain.methods.consistency import check_guidance, flow_step, lcm_timesteps, pseudo_huber, same_dropout
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser, drop_condition
from gentrain.noise import Noise
from gentrain.paths.base import Path, convert_time, expand
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.base import Sampler
from gentrain.samplers.lcm import LCM, check_timesteps, consistent, grid_of, stable_diffusion_grid


def augmented_x0(denoiser: Denoiser, x: Tensor, t: Tensor, condition: Condition | None, w: Tensor) -> Tensor:
    """conditional + w (conditional - null) of the x0 prediction, a weight w [B] for each row (arXiv:2310.04378, eq. 15); one call.

    w = 0 is no guidance: w is the guidance weight of samplers less 1. Without a condition there is nothing to mix.
    """
    if condition is None:
        return denoiser.x0(x, t, None)
    null = drop_condition(condition, torch.ones(len(x), dtype=torch.bool, device=x.device))
    both = {key: torch.cat([value, null[key]]) for key, value in condition.items()}
    given, free = denoiser.x0(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    return given + expand(w, x) * (given - free)


def solve(
    solver: Literal["ddim", "dpmpp_2s"], denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None, w: Tensor
) -> Tensor:
    """From x at t [B] to s [B] along the guided flow, with one (ddim) or two (dpmpp_2s) calls of the teacher.

    dpmpp_2s is DPM-Solver++(2S) with its inner point in the middle of log(alpha / sigma) (arXiv:2211.01095, algorithm 1, r = 1/2): DDIM to
    the middle, then DDIM over the whole with the x0 found there.
    """
    path = denoiser.path
    x0 = augmented_x0(denoiser, x, t, condition, w)
    if solver == "dpmpp_2s":
        middle = path.time_of_log_snr((path.log_snr(t) + path.log_snr(s)) / 2)
        x0 = augmented_x0(denoiser, flow_step(path, x, x0, t, middle), middle, condition, w)
    return flow_step(path, x, x0, t, s)


class Taught(NamedTuple):
    """What one step compares, in the path's coordinates."""

    found: Tensor  # [B, ...] the student's, at the interval's beginning
    target: Tensor  # [B, ...] the target's, at its end, without gradient
    x0: Tensor  # [B, ...] the data
    interval: Tensor  # [B] int64, 0 is the one next to the data


@register("latent_consistency")
@dataclass
class LatentConsistency(Method):
    """Latent consistency distillation (arXiv:2310.04378), in the latent space of a pipeline or in that of the data.

    f(z, t) = c_skip(t) z + c_out(t) x0 is taught that f(z_t, t) = f'(z_s, s), z_s being what one guided step of the teacher over `stride`
    timesteps makes of z_t, and f' the average of past students (the role `target`). The timesteps are those of a variance-preserving path:
    the teacher's own, or `grid`, on which any other teacher is read by equal signal-to-noise ratio.

    Its fixed point is the teacher's own sampler of `count` steps, not the exact flow. With two different weights in `guidance` the student
    reads the weight as an input and imitates any in between. roles.teacher.weights names the teacher's run.
    """

    generator: ClassVar[str | None] = "student"

    guidance: tuple[NonNegativeFloat, NonNegativeFloat] = option(
        (3.0, 15.0),
        "lowest and highest weight of the teacher's guidance, as samplers count it; equal = a fixed weight that is no input",
        source="arXiv:2310.04378, section 5 (w in [2, 14], and w + 1 here)",
    )
    solver: Literal["ddim", "dpmpp_2s"] = option("ddim", "the teacher's step: one call, or two and of second order")
    count: PositiveInt = option(50, "timesteps between which the teacher steps", source="arXiv:2310.04378, code release")
    stride: PositiveInt = option(20, "distance between them", unit="timesteps", source="arXiv:2310.04378, section 4.3")
    distance: Literal["huber", "l2"] = option("huber", "elementwise, averaged over C, H, W")
    huber: PositiveFloat = option(1e-3, "where the distance turns from quadratic to linear", source="arXiv:2310.04378, code release")
    target_decay: Fraction = option(0.95, "of the average that makes the targets; 0 = the student itself", source="arXiv:2310.04378, 5.1")
    grid: VariancePreserving = option(stable_diffusion_grid, "the timesteps' path, where the teacher's own is not variance preserving")

    def __post_init__(self) -> None:
        low, high = self.guidance
        if low > high:
            raise ValueError(f"guidance [{low:g}, {high:g}] reads [lowest, highest]; swap them")
        if self.target_decay == 1:
            raise ValueError("with target_decay 1 the target would stay the teacher, the student learn one of its steps; set it below 1")
        inputs = ("guidance",) if low < high else ()
        roles: dict[str, Role] = {
            "teacher": Frozen(given=True, flow=True),
            "student": Trained(init="teacher", ema=True, inputs=inputs),
            "target": Trained(init="student", inputs=inputs),
        }
        vars(self)["roles"] = roles  # whether there is an embedding is part of the configuration

    def check(self, path: Path) -> None:
        with errors_about("count"):
            check_timesteps(self.count, self.stride, grid_of(path, self.grid))

    def check_data(self, data: Data) -> None:
        for weight in self.guidance:
            check_guidance(weight, data)

    def own_sampler(self) -> Sampler:
        low, high = self.guidance
        steps = min(4, self.count)
        return LCM(steps=steps, count=self.count, stride=self.stride, grid=self.grid, guidance=(low + high) / 2 if low < high else 1.0)

    def check_sampler(self, sampler: Sampler) -> None:
        if not isinstance(sampler, LCM):
            raise ValueError(f"the student answers on its timesteps, at which {sampler.registered_name} does not ask; take lcm")
        if (sampler.count, sampler.stride, sampler.grid) != (self.count, self.stride, self.grid):
            raise ValueError(
                f"the student is taught on {self.count} timesteps {self.stride} apart, and the sampler lcm asks it on {sampler.count} "
                f"{sampler.stride} apart; give both the same count, stride and grid"
            )
        low, high = self.guidance
        if low < high and not low <= sampler.guidance <= high:
            raise ValueError(
                f"the student is taught guidance {low:g} to {high:g}, not {sampler.guidance:g}; set sampler.guidance to one of these"
            )
        if low == high and sampler.guidance not in (1.0, low):
            raise ValueError(f"guidance {low:g} is built in, and {sampler.guidance:g} would change nothing; leave sampler.guidance out")

    def updates(self, clock: Clock) -> Iterator[Update | Follow]:
        yield Update("student", self.loss)
        yield Follow("target", of="student", decay=self.target_decay)

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        taught = self.teach(nets, batch, noise)
        loss = self.distances(taught)
        return Loss(loss.mean(), {"first_interval": (loss.detach().flatten(1).mean(1) * (taught.interval == 0)).mean()})

    def distances(self, taught: Taught) -> Tensor:
        """Of every coordinate, [B, ...]."""
        if self.distance == "huber":
            return pseudo_huber(taught.found, taught.target, self.huber)
        return (taught.found - taught.target).square()

    def teach(self, nets: Nets, batch: Batch, noise: Noise) -> Taught:
        """What the student and its target make of a batch; gradients flow through the student's part."""
        path, condition, rows = nets.student.path, condition_of(batch), (len(batch["x"]),)
        grid, x0 = grid_of(path, self.grid), path.space.encode(batch["x"])
        index = noise.randint(0, self.count, rows).to(x0.device)
        start = lcm_timesteps(self.count, self.stride).to(x0.device)[index]
        end = (start - self.stride).clamp(min=0)
        t, s = (convert_time(timesteps.double(), grid, path).to(x0) for timesteps in (start, end))
        low, high = self.guidance
        w = noise.uniform(rows, low - 1, high - 1).to(x0) if low < high else torch.full_like(t, low - 1)
        seen = {**(condition or {}), "guidance": w} if low < high else condition
        x_t = path.perturb(x0, path.draw_eps(noise, tuple(x0.shape)), t)
        with torch.no_grad(), same_dropout(x_t):
            x_s = solve(self.solver, nets.teacher, x_t, t, s, condition, w)
            target = consistent(path, grid, x_s, nets.target.x0(x_s, s, seen), end)
        return Taught(consistent(path, grid, x_t, nets.student.x0(x_t, t, seen), start), target, x0, index)
