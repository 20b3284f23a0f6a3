"""Consistency distillation: a student that goes from any point of the teacher's probability flow to its end in one call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from gentrain.config import option, register
from gentrain.methods.base import Batch, Clock, Frozen, Loss, Method, Nets, Role, Trained, Update, condition_of
from gentrain.noise import Noise
from gentrain.paths.base import Path, expand
from gentrain.samplers.guidance import guided_x0

HUBER = 0.00054  # of the root of the number of coordinates (arXiv:2310.14189, section 3.3)


def row_huber(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c of each row, c = 0.00054 sqrt(D) (arXiv:2310.14189, eq. 7): [B, ...], [B, ...] -> [B]."""
    difference = (a - b).flatten(1)
    c = HUBER * difference.shape[1] ** 0.5
    return (difference.square().sum(1) + c**2).sqrt() - c


def flow_step(path: Path, x: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """From x at time t [B] to time s < t along the probability flow, its x0 held fixed: DDIM's step, Euler's on a rectified flow.

    Where the path's space has walls the step is mirrored at them.
    """
    eps = (x - expand(path.alpha(t), x) * x0) / expand(path.sigma(t), x)
    there = expand(path.alpha(s), x) * x0 + expand(path.sigma(s), x) * eps
    return there if path.space.bounds is None else path.space.bounds.reflect(there, x)


@register("consistency_distillation")
@dataclass
class ConsistencyDistillation(Method):
    """Consistency distillation in discrete time (arXiv:2303.01469, algorithm 2). The target network is the student itself, held fixed.

    An average of past students as the target is no better (arXiv:2310.14189, section 3.2).

    f(x, t) is the student's x0 prediction, which is x at t = 0 for the predictions v, velocity and edm. It is taught that f(x_t, t) =
    f(x_s, s) for the point x_s that one step of the teacher reaches from x_t. It works in whatever space the teacher's path has: a student
    of a mirror flow, too. roles.teacher.weights names the teacher's run, whose path and prediction are the student's.
    """

    roles: ClassVar[dict[str, Role]] = {"teacher": Frozen(), "student": Trained(init="teacher", ema=True)}
    generator: ClassVar[str | None] = "student"

    intervals: PositiveInt = option(40, "steps of the teacher from noise to data", source="arXiv:2303.01469, section 6")
    guidance: NonNegativeFloat = option(
        1.0, "of the teacher, learnt by the student: null + w (conditional - null)", source="arXiv:2310.04378"
    )

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        student, path, condition = nets.student, nets.student.path, condition_of(batch)
        if student.prediction in ("x0", "eps"):
            raise ValueError(f"a student that predicts {student.prediction} is not x itself at t = 0; set prediction to velocity, v or edm")
        x0 = path.space.encode(batch["x"])
        times = torch.cat([path.sampling_times(self.intervals), torch.tensor([path.t_min], dtype=torch.float64)]).to(x0)
        index = noise.randint(0, self.intervals, (len(x0),))
        t, s = times[index], times[index + 1]
        x_t = path.perturb(x0, path.draw_eps(noise, tuple(x0.shape)), t)
        with torch.no_grad():
            x_s = flow_step(path, x_t, guided_x0(nets.teacher, x_t, t, condition, self.guidance), t, s)
            target = student.x0(x_s, s, condition)
        loss = row_huber(student.x0(x_t, t, condition), target)
        return Loss(loss.mean(), {"last_interval": (loss.detach() * (index == self.intervals - 1)).mean()})
