"""Noise consistency training: a one-step generator learns a control without a teacher's scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from gentrain.config import errors_about, option, register
from gentrain.data.base import Data
from gentrain.extractors.base import Extractor
from gentrain.methods.base import Batch, Clock, Frozen, Loss, Method, Nets, Role, Trained, Update
from gentrain.methods.consistency import DISTANCES, Distance
from gentrain.methods.controlled import BRANCH, control_shown, known_of, steered
from gentrain.methods.rewarded import with_judges
from gentrain.models.base import Condition
from gentrain.models.multiplier import Multiplier
from gentrain.noise import Noise
from gentrain.paths.base import Path, expand
from gentrain.samplers.base import Sampler
from gentrain.samplers.one_step import SIGMA, OneStep, check_sigma, generate, require_one_step


def diffused(z: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """sqrt(1 - sigma^2) z + sigma eps, of the law of z where that is normal and eps is drawn apart: [B, ...] each, sigma [B] in [0, 1]."""
    return expand((1 - sigma**2).clamp(min=0).sqrt(), z) * z + expand(sigma, z) * eps


def dual_loss(multiplier: Tensor, boundary: Tensor, margin: float) -> Tensor:
    """-lambda (boundary - margin), by which descent raises lambda while the constraint boundary <= margin is not met: scalars."""
    return -multiplier * (boundary.detach() - margin)


@register("noise_consistency")
@dataclass
class NoiseConsistency(Method):
    """Noise consistency training (arXiv:2506.19741): the cheap way to give a one-step generator a control.

    The generator's own sample x = f(z) shows a control c = h(x), so that for the noise z the answer is known: f(z, c) should be x. As z is
    diffused towards fresh noise the answers should stay alike: f(z', c) = f(z, c) for neighbouring levels, which carries the control to any
    noise. No images of the data (their shape, and labels or prompts, at most), no scores, no gradient through h. roles.teacher.weights
    names the run of the one-step generator.
    """

    generator: ClassVar[str | None] = "student"
    guarded: ClassVar[tuple[str, ...]] = ("grad_norm/student",)

    control: Extractor = option(help="what a sample shows, and is then asked for")
    levels: PositiveInt = option(10, "of noise, from z itself to noise that has nothing to do with it, at equal distances of sigma")
    distance: Distance = option("huber", "pseudo-Huber norm of a row over the root of its coordinates, or its mean square")
    margin: NonNegativeFloat = option(0.1, "the distance of f(z, c) from x that is allowed: lambda rises while it is larger, else falls")
    sigma: PositiveFloat = option(SIGMA, "noise-to-signal ratio at which the generator is given pure noise, as in its own run")

    def __post_init__(self) -> None:
        roles: dict[str, Role] = {
            "teacher": Frozen(given=True, one_step=True),
            "student": Trained(init="teacher", ema=True, control=self.control, trainable=BRANCH),
            "multiplier": Trained(denoiser=False, model=Multiplier()),
        }
        vars(self)["roles"] = with_judges(roles, control=self.control)

    @property
    def reads_data(self) -> bool:
        return False

    def check(self, path: Path) -> None:
        check_sigma(path, self.sigma)
        if not path.space.normal:  # see diffused
            raise ValueError(
                "noise_consistency adds draws of noise up, which leaves only a normal law as it is; take free, or dual with nu .inf"
            )

    def check_data(self, data: Data) -> None:
        with errors_about("control"):
            self.control.check_data(data)

    def own_sampler(self) -> Sampler:
        return OneStep(sigma=self.sigma)

    def check_sampler(self, sampler: Sampler) -> None:
        require_one_step(sampler, self.sigma)

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("student", self.student_loss)
        yield Update("multiplier", self.multiplier_loss)

    def student_loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        """Consistency of neighbouring levels plus lambda times the boundary's distance."""
        z, x, asked = self._draw(nets, batch, noise)
        eps = nets.student.path.draw_eps(noise, tuple(z.shape))
        level = noise.randint(0, self.levels, (len(z),)).to(z)
        with torch.no_grad():
            nearer = self._student(nets, diffused(z, eps, level / self.levels), asked)
        consistency = self._distance(self._student(nets, diffused(z, eps, (level + 1) / self.levels), asked), nearer).mean()
        boundary = self._distance(self._student(nets, z, asked), x).mean()
        weight = nets.multiplier(z).detach()[0]
        logs = {"consistency": consistency.detach(), "boundary": boundary.detach(), "multiplier": weight}
        return Loss(consistency + weight * boundary, logs)

    def multiplier_loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        z, x, asked = self._draw(nets, batch, noise)
        with torch.no_grad():
            boundary = self._distance(self._student(nets, z, asked), x).mean()
        return Loss(dual_loss(nets.multiplier(z).mean(), boundary, self.margin))

    def _draw(self, nets: Nets, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor, Condition]:
        """(z, the generator's sample x of it, the condition with what x shows)."""
        path, known = nets.student.path, known_of(self.control, batch)
        z = path.draw_eps(noise, tuple(batch["x"].shape))
        with torch.no_grad():
            x = generate(nets.teacher, z, self.sigma, known)
        return z, x, steered(known, control_shown(self.control, nets, path, x))

    def _student(self, nets: Nets, z: Tensor, asked: Condition) -> Tensor:
        return generate(nets.student, z, self.sigma, asked)

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        coordinates = a[0].numel()
        return DISTANCES[self.distance](a, b) / (coordinates**0.5 if self.distance == "huber" else coordinates)
