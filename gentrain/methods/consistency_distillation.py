"""Consistency distillation: a student that goes from any point of the teacher's probability flow to its end in one call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveInt

from gentrain.config import errors_about, option, register
from gentrain.data.base import Data
from gentrain.methods.base import Batch, Clock, Frozen, Loss, Nets, Role, Trained, Update, condition_of
from gentrain.methods.consistency import DISTANCES, ConsistencyFunction, Distance, Solver, check_guidance, same_dropout, solver_step
from gentrain.noise import Noise
from gentrain.paths.base import Path


@register("consistency_distillation")
@dataclass
class ConsistencyDistillation(ConsistencyFunction):
    """Consistency distillation in discrete time (arXiv:2303.01469, algorithm 2). The target network is the student itself, held fixed.

    An average of past students as the target is no better (arXiv:2310.14189, section 3.2).

    f(x, t) is the student's x0 prediction, which is x at t = 0 for the predictions v, velocity and edm. It is taught that f(x_t, t) =
    f(x_s, s) for the point x_s that one step of the teacher reaches from x_t. It works in whatever space the teacher's path has: a student
    of a mirror flow, too. roles.teacher.weights names the teacher's run, whose path and prediction are the student's.
    """

    roles: ClassVar[dict[str, Role]] = {"teacher": Frozen(given=True, flow=True), "student": Trained(init="teacher", ema=True)}
    generator: ClassVar[str | None] = "student"

    intervals: PositiveInt = option(40, "steps of the teacher from noise to data", source="arXiv:2303.01469, section 6")
    solver: Solver = option("ddim", "the teacher's step: one call, or two and of second order", source="arXiv:2303.01469, section 6")
    distance: Distance = option("huber", "pseudo-Huber norm of a row, or its square, whose optimum is the mean in few coordinates, too")
    guidance: NonNegativeFloat = option(
        1.0, "of the teacher, learnt by the student: null + w (conditional - null)", source="arXiv:2310.04378"
    )

    def check(self, path: Path) -> None:
        with errors_about("intervals"):
            path.jump_times(self.intervals)

    def check_data(self, data: Data) -> None:
        check_guidance(self.guidance, data)

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        student, path, condition = nets.student, nets.student.path, condition_of(batch)
        x0 = path.space.encode(batch["x"])
        times = torch.cat([path.jump_times(self.intervals), torch.tensor([path.t_min], dtype=torch.float64)]).to(x0)
        index = noise.randint(0, self.intervals, (len(x0),))
        t, s = times[index], times[index + 1]
        x_t = path.perturb(x0, path.draw_eps(noise, tuple(x0.shape)), t)
        with torch.no_grad(), same_dropout(x_t):
            x_s = solver_step(self.solver, nets.teacher, x_t, t, s, condition, self.guidance)
            target = student.x0(x_s, s, condition)
        loss = DISTANCES[self.distance](student.x0(x_t, t, condition), target)
        return Loss(loss.mean(), {"last_interval": (loss.detach() * (index == self.intervals - 1)).mean()})
