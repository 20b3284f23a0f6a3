"""Easy consistency tuning: a diffusion model becomes a consistency model while the distance of the two times shrinks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from gentrain.config import Fraction, option, register
from gentrain.methods.base import Batch, Clock, Loss, Nets, Role, Trained, Update, condition_of
from gentrain.methods.consistency import DISTANCES, ConsistencyFunction, Distance, noise_ratio, same_dropout, time_of_ratio
from gentrain.models.denoiser import drop_condition
from gentrain.noise import Noise
from gentrain.paths.base import TimeLaw, expand
from gentrain.paths.times import LogNormal


def earlier_level(level: Tensor, shrink: float, k: float = 8.0, b: float = 1.0) -> Tensor:
    """r = max(level (1 - shrink n(level)), 0), n = 1 + k sigmoid(-b level) (arXiv:2406.14548, section 4.2): noise levels of any shape.

    shrink = 1 / q^(stage + 1): at first large, so that most r are 0, which is diffusion; then the derivative's limit.
    """
    return (level * (1 - shrink * (1 + k * (-b * level).sigmoid()))).clamp(min=0)


def level_weight(name: Literal["interval", "root_interval", "level"], t: Tensor, r: Tensor) -> Tensor:
    """1 / (t - r), (t - r)^(-1/2) or t^-2 of noise levels [B] t > r."""
    return {"interval": 1 / (t - r), "root_interval": (t - r).rsqrt(), "level": t**-2}[name]


def draw_law() -> LogNormal:
    return LogNormal(mean=-1.1, std=2.0)


@register("easy_consistency_tuning")
@dataclass
class EasyConsistencyTuning(ConsistencyFunction):
    """Easy consistency tuning (ECT, arXiv:2406.14548). Begin from a diffusion or flow model: roles.model.weights names its run.

    As in consistency training x_t and x_r share data and noise and f(x_t, t) is drawn to sg f(x_r, r), with x itself at r = 0. But t is any
    time, and r follows it ever more closely: t - r falls by q in each of `stages` equal parts of the run. Levels are sigma / alpha.
    """

    roles: ClassVar[dict[str, Role]] = {"model": Trained(ema=True)}
    generator: ClassVar[str | None] = "model"

    times: TimeLaw = option(draw_law, "law of t", source="arXiv:2406.14548, section 4.2")
    q: PositiveInt = option(2, "factor by which t - r falls from stage to stage", source="arXiv:2406.14548, section 4.2")
    stages: PositiveInt = option(8, "equal parts of the run", source="arXiv:2406.14548, code release")
    closest: Fraction = option(0.001, "t - r falls no further than to this share of t", source="arXiv:2406.14548, code release")
    weighting: Literal["interval", "root_interval", "level"] = option("interval", "1 / (t - r), (t - r)^(-1/2) or t^-2")
    distance: Distance = option("huber", "pseudo-Huber norm of a row, or its square, whose optimum is the mean in few coordinates, too")
    label_dropout: Fraction = option(0.1, "probability that a label becomes the null class", source="arXiv:2207.12598")

    def __post_init__(self) -> None:
        if self.q < 2:
            raise ValueError("with q 1 the two times never come closer, which is diffusion to the end; set it to 2 or more")
        if self.closest == 1:
            raise ValueError("with closest 1 the two times never come closer, which is diffusion to the end; set it below 1")

    def shrink(self, progress: float) -> float:
        """1 - rho of the stage at `progress` in [0, 1]."""
        stage = min(int(progress * self.stages), self.stages - 1)
        return max(self.q ** -(stage + 1.0), self.closest)

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("model", partial(self.loss, self.shrink(clock.progress)))

    def loss(self, shrink: float, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        path, condition = nets.model.path, condition_of(batch)
        x0 = path.space.encode(batch["x"])
        t = self.times.sample(noise.uniform((len(x0),)).to(x0), path)
        level = noise_ratio(path, t).clamp(1e-4, 1e4)
        before = earlier_level(level, shrink)
        t, r = time_of_ratio(path, level), time_of_ratio(path, before)
        if condition is not None:
            condition = drop_condition(condition, noise.bernoulli(self.label_dropout, (len(x0),)))
        eps = path.draw_eps(noise, tuple(x0.shape))
        x_t, x_r = path.perturb(x0, eps, t), path.perturb(x0, eps, r)
        with torch.no_grad(), same_dropout(x0):
            target = torch.where(expand(before > 0, x0), nets.model.x0(x_r, r, condition), x0)
        loss = level_weight(self.weighting, level, before) * DISTANCES[self.distance](nets.model.x0(x_t, t, condition), target)
        return Loss(loss.mean(), {"diffusion_share": (before == 0).float().mean()})
