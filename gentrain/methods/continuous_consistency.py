"""Continuous-time consistency models: the limit of neighbouring times, by a derivative along the flow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from gentrain.config import Fraction, option, register
from gentrain.data.base import Data
from gentrain.methods.base import Batch, Clock, Frozen, Loss, Nets, Role, Trained, Update, condition_of
from gentrain.methods.consistency import (
    ConsistencyFunction,
    Derivative,
    check_guidance,
    check_step,
    derivative_along,
    guided_velocity,
    time_of_ratio,
)
from gentrain.models.loss_weight import LossWeight
from gentrain.models.reading import read_on
from gentrain.noise import Noise
from gentrain.paths.base import expand
from gentrain.paths.trigflow import TrigFlow


def tangent(x: Tensor, t: Tensor, output: Tensor, velocity: Tensor, derivative: Tensor, warmup: float) -> Tensor:
    """-cos^2 t (V - dx/dt) - warmup cos t sin t (x + dV/dt): cos t times d f(x_t, t) / dt for warmup = 1 (arXiv:2410.11081, eq. 6).

    Args:
        x, t: a point of TrigFlow [B, ...] and its time [B]. f = cos t x - sin t V.
        output: V = sigma_data F, the student's velocity. velocity: dx/dt of the flow. derivative: dV/dt along it.
        warmup: 0 holds only what is stable; 1 is the whole (section 4.1).

    Returns [B, ...].
    """
    cos, sin = expand(t.cos(), x), expand(t.sin(), x)
    return -(cos**2) * (output - velocity) - warmup * cos * sin * (x + derivative)


def normalised(tangent: Tensor, c: float) -> Tensor:
    """g / (|g| + c), the norm a root mean square over C, H, W, so that one c fits any size of image (arXiv:2410.11081, section 4.1)."""
    norm = tangent.flatten(1).square().mean(1).sqrt()
    return tangent / (expand(norm, tangent) + c)


@register("continuous_consistency")
@dataclass
class ContinuousConsistency(ConsistencyFunction):
    """Continuous-time consistency models (sCM, arXiv:2410.11081), as distillation or from data alone.

    On TrigFlow, x_t = cos t x0 + sin t z, the student's velocity V is moved by the normalised tangent: |V - sg V - sg g|^2 with a weight
    exp(w(t)) that a small network learns. Networks of any path are read on TrigFlow by equal signal-to-noise ratio, so that the student of
    a flow or a diffusion model starts where its teacher is.

    source "teacher": the flow is the guided teacher's, roles.teacher.weights its run (sCD). "data": the flow is estimated by the line from
    the data point through its noise (sCT); roles.student.weights should name a run to begin from.
    """

    generator: ClassVar[str | None] = "student"
    guarded: ClassVar[tuple[str, ...]] = ("loss/student", "grad_norm/student")

    source: Literal["teacher", "data"] = option("teacher", "of the velocity dx/dt")
    guidance: NonNegativeFloat = option(1.0, "of the teacher, learnt by the student: null + w (conditional - null)")
    mean: float = option(-1.0, "of log(sigma / alpha)", source="arXiv:2410.11081, table 5")
    std: PositiveFloat = option(1.4, "of log(sigma / alpha)", source="arXiv:2410.11081, table 5")
    warmup: Fraction = option(0.1, "share of the run over which the tangent's second part comes in", source="arXiv:2410.11081, section 4.1")
    normalisation: PositiveFloat = option(0.1, "c of the tangent's normalisation", source="arXiv:2410.11081, section 4.1")
    derivative: Derivative = option("jvp", "forward-mode derivative, or central difference (any engine)")
    step: PositiveFloat = option(0.005, "of the central difference", unit="rad")

    def __post_init__(self) -> None:
        check_step(self.step)
        longest = TrigFlow().t_max / 4
        if self.step >= longest:
            raise ValueError(f"step {self.step:g} leaves no times between the path's ends; set it below {longest:.2g}")
        roles: dict[str, Role] = {
            "student": Trained(ema=True),
            "weighting": Trained(denoiser=False, model=LossWeight()),
        }
        if self.source == "teacher":
            roles = {"teacher": Frozen(given=True, flow=True), **roles, "student": Trained(init="teacher", ema=True)}
        elif self.guidance != 1:
            raise ValueError("guidance needs a teacher; set source to teacher, or guidance to 1")
        vars(self)["roles"] = roles  # whether there is a teacher is part of the configuration

    @property
    def forward_mode(self) -> tuple[str, ...]:
        return ("student",) if self.derivative == "jvp" else ()

    def check_data(self, data: Data) -> None:
        check_guidance(self.guidance, data)

    def updates(self, clock: Clock) -> Iterator[Update]:
        blend = min(1.0, clock.progress / self.warmup) if self.warmup else 1.0
        errors: list[tuple[Tensor, Tensor]] = []  # what the student's losses leave for the weighting, one entry per micro-batch
        yield Update("student", partial(self.loss, blend, errors))
        yield Update("weighting", partial(self.weighting_loss, errors))

    def loss(self, blend: float, errors: list[tuple[Tensor, Tensor]], nets: Nets, batch: Batch, noise: Noise) -> Loss:
        path, condition = nets.student.path, condition_of(batch)
        trig = TrigFlow(sigma_data=path.sigma_data, space=path.space)
        student, x0 = read_on(nets.student, trig), path.space.encode(batch["x"])
        t = time_of_ratio(trig, noise_ratios(noise.uniform((len(x0),)).to(x0), self.mean, self.std))
        if self.derivative == "difference":
            t = t.clamp(2 * self.step, trig.t_max - 2 * self.step)  # there is no path on the other side of its ends
        eps = path.draw_eps(noise, tuple(x0.shape))
        x_t = trig.perturb(x0, eps, t)
        if self.source == "data":
            velocity = trig.velocity(x0, eps, t)
        else:
            velocity = guided_velocity(read_on(nets.teacher, trig), x_t, t, condition, self.guidance)
        derivative = derivative_along(
            lambda x, time: student.velocity(x, time, condition), x_t, t, velocity, torch.ones_like(t), self.derivative, self.step
        )
        output = student.velocity(x_t, t, condition)
        g = normalised(tangent(x_t, t, output.detach(), velocity, derivative, blend), self.normalisation)
        # the network's own scale: V / sigma_data is of order 1
        error = (output - output.detach()) / trig.sigma_data - g
        square = error.square().flatten(1).mean(1)
        errors.append((t, square.detach()))
        weight = nets.weighting(x_t, trig.network_time(t))  # frozen here
        return Loss((weight.exp() * square).mean(), {"error": square.detach().mean(), "blend": torch.tensor(blend)})

    def weighting_loss(self, errors: list[tuple[Tensor, Tensor]], nets: Nets, batch: Batch, noise: Noise) -> Loss:
        """exp(w) error - w: least at w = -log E[error | t], which gives every time the same share of the student's loss."""
        t, error = errors.pop(0)
        weight = nets.weighting(batch["x"], TrigFlow().network_time(t))
        return Loss((weight.exp() * error - weight).mean(), {"weight": weight.detach().mean()})


def noise_ratios(uniform: Tensor, mean: float, std: float) -> Tensor:
    """sigma / alpha = tan t sigma_data, log-normal, kept within e^-8 and e^8 where times are not yet 0 or pi / 2: [B] -> [B]."""
    return (mean + std * torch.special.ndtri(uniform)).clamp(-8, 8).exp()
