"""MeanFlow: the average velocity between two times, which is a flow map of any length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from gentrain.config import Fraction, option, register
from gentrain.data.base import Data
from gentrain.methods.base import Batch, Clock, Loss, Method, Nets, Role, Trained, Update, condition_of
from gentrain.methods.consistency import Derivative, check_guidance, check_step, derivative_along
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser, Prediction, drop_condition
from gentrain.noise import Noise
from gentrain.paths.base import Path, TimeLaw, expand
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.times import LogitNormal
from gentrain.samplers.base import Sampler
from gentrain.samplers.consistency import Consistency
from gentrain.samplers.few_step import FewStep
from gentrain.samplers.flow_map import FlowMap
from gentrain.samplers.lcm import LCM
from gentrain.samplers.one_step import OneStep


def mean_flow_target(velocity: Tensor, derivative: Tensor, length: Tensor) -> Tensor:
    """v - (t - r) du/dt, what the average velocity u over [r, t] must be (arXiv:2505.13447, eq. 10); length = t - r [B]."""
    return velocity - expand(length, velocity) * derivative


def adaptive_loss(error: Tensor, power: float, c: float) -> Tensor:
    """|e|^2 times sg 1 / (|e|^2 + c)^power of each row (arXiv:2505.13447, section 4.3): [B, ...] -> [B], the square summed over C, H, W."""
    square = error.square().flatten(1).sum(1)
    return square / (square.detach() + c) ** power


def draw_law() -> LogitNormal:
    return LogitNormal(mean=-0.4, std=1.0)


@register("mean_flow")
@dataclass
class MeanFlow(Method):
    """MeanFlow (arXiv:2505.13447) on the rectified flow, from data alone; roles.model.weights may name a flow to begin from.

    u(x_t, r, t) satisfies u = v - (t - r) d u / dt along the flow, which the network learns with the right side held fixed. The network
    reads r as its input `end`; without it it gives the velocity itself, so that ordinary samplers work too. With `guidance` the velocity is
    replaced by the guided one of the network itself: samples are then drawn without further guidance.
    """

    roles: ClassVar[dict[str, Role]] = {"model": Trained(ema=True, inputs=("end",))}
    generator: ClassVar[str | None] = "model"
    predictions: ClassVar[tuple[Prediction, ...] | None] = ("velocity",)

    times: TimeLaw = option(draw_law, "law of both times, the later of which is t", source="arXiv:2505.13447, table 1")
    equal: Fraction = option(0.75, "share of rows with r = t, which is flow matching", source="arXiv:2505.13447, table 1")
    power: NonNegativeFloat = option(1.0, "of the adaptive weight", source="arXiv:2505.13447, table 1")
    c: PositiveFloat = option(1e-3, "of the adaptive weight", source="arXiv:2505.13447, code release")
    guidance: NonNegativeFloat = option(1.0, "weight that is learnt: null + w (conditional - null)", source="arXiv:2505.13447, section 4.2")
    mixing: Fraction = option(
        0.0, "kappa: how much of the guided velocity is the network's own given the label", source="arXiv:2505.13447, app. A"
    )
    label_dropout: Fraction = option(0.1, "probability that a label becomes the null class", source="arXiv:2207.12598")
    derivative: Derivative = option("jvp", "forward-mode derivative, or central difference (any engine)")
    step: PositiveFloat = option(0.005, "of the central difference", unit="time")

    def __post_init__(self) -> None:
        if self.mixing == 1:
            raise ValueError("mixing 1 leaves nothing of the data's velocity; set it below 1")
        if self.guidance != 1 and self.label_dropout == 0:
            raise ValueError("guidance mixes in the null class, which label_dropout 0 does not train; raise that, or set guidance to 1")
        check_step(self.step)
        if self.step >= 0.5:
            raise ValueError(f"step {self.step:g} reaches over the whole path, of length 1, and beyond; set it below 0.5")

    @property
    def forward_mode(self) -> tuple[str, ...]:
        return ("model",) if self.derivative == "jvp" else ()

    def check(self, path: Path) -> None:
        if not isinstance(path, RectifiedFlow):
            raise ValueError(f"mean_flow needs the path rectified_flow, not {path.registered_name}")

    def check_data(self, data: Data) -> None:
        check_guidance(self.guidance, data)
        check_guidance(self.mixing, data, "mixing", without=0)

    def own_sampler(self) -> Sampler:
        return FlowMap()

    def check_sampler(self, sampler: Sampler) -> None:
        if isinstance(sampler, Consistency | LCM | OneStep | FewStep):
            raise ValueError(f"{sampler.registered_name} takes the x0 of a velocity for data; take flow_map, or one that follows a flow")
        if self.guidance != 1 and sampler.guidance != 1:
            raise ValueError(f"guidance {self.guidance:g} is learnt, and {sampler.guidance:g} would come on top; set sampler.guidance to 1")

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("model", self.loss)

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        model, path, rows = nets.model, nets.model.path, (len(batch["x"]),)
        x0, condition = path.space.encode(batch["x"]), condition_of(batch)
        first, second = (self.times.sample(noise.uniform(rows).to(x0), path) for _ in range(2))
        t, r = torch.maximum(first, second), torch.minimum(first, second)
        r = torch.where(noise.bernoulli(self.equal, rows).to(t.device), t, r)
        dropped = noise.bernoulli(self.label_dropout, rows).to(t.device)
        eps = path.draw_eps(noise, tuple(x0.shape))
        x_t, velocity = path.perturb(x0, eps, t), path.velocity(x0, eps, t)
        if condition is not None:
            velocity = self._guided(model, x_t, t, condition, velocity, dropped)
            condition = drop_condition(condition, dropped)
        seen = {**(condition or {}), "end": path.network_time(r)}
        derivative = derivative_along(
            lambda x, time: model.velocity(x, time, seen), x_t, t, velocity, torch.ones_like(t), self.derivative, self.step
        )
        error = model.velocity(x_t, t, seen) - mean_flow_target(velocity, derivative, t - r)
        loss = adaptive_loss(error, self.power, self.c)
        square = error.detach().square().flatten(1).mean(1)
        return Loss(loss.mean(), {"error": square.mean(), "error_velocity": (square * (r == t)).mean()})

    def _guided(self, model: Denoiser, x: Tensor, t: Tensor, condition: Condition, velocity: Tensor, dropped: Tensor) -> Tensor:
        """omega v + kappa u_c + (1 - omega - kappa) u_null, omega = guidance (1 - kappa); v itself where labels are dropped."""
        if self.guidance == 1 and self.mixing == 0:
            return velocity
        omega = self.guidance * (1 - self.mixing)
        null = drop_condition(condition, torch.ones_like(dropped))
        both = {key: torch.cat([value, null[key]]) for key, value in condition.items()}
        with torch.no_grad():
            own, free = model.velocity(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        mixed = omega * velocity + self.mixing * own + (1 - omega - self.mixing) * free
        return torch.where(expand(dropped, velocity), velocity, mixed)
