"""Score Forgetting Distillation: a one-step generator that has forgotten a class, made without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from gentrain.config import ConfigError, Fraction, option, register
from gentrain.data.base import Data
from gentrain.data.concepts import NEGATIVE, OVERRIDE
from gentrain.methods.base import Batch, Clock, Frozen, Loss, Nets, Role, Trained, Update, condition_of, part_of
from gentrain.methods.forgetting import UNIFORM, Forgetting, draw_classes, override_weights
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser, drop_condition
from gentrain.noise import Noise
from gentrain.paths.base import Path, expand
from gentrain.samplers.base import Sampler
from gentrain.samplers.guidance import guided_x0
from gentrain.samplers.one_step import SIGMA, OneStep, check_sigma, generate, require_one_step, time_at

_LEAST_OMEGA = 1e-5
CLASSIFIER = "classifier"


def score_identity_loss(x_g: Tensor, teacher_x0: Tensor, fake_x0: Tensor, alpha: float) -> Tensor:
    """<d, (y - x_g) - alpha d> / omega of each row, d = y - y_fake (arXiv:2404.04057, eq. 23): [B, ...] each -> [B].

    y and y_fake are the teacher's and the fake score's x0 predictions at the same noised x_g. The product is a sum over C, H, W;
    omega = max(mean over C, H, W of |y - x_g|, 1e-5) is the only thing detached: gradients flow through x_g and through both predictions.
    The loss is no distance: it may be negative and need not fall.
    """
    difference, error = teacher_x0 - fake_x0, teacher_x0 - x_g
    omega = error.detach().abs().flatten(1).mean(1).clamp(min=_LEAST_OMEGA)
    return (difference * (error - alpha * difference)).flatten(1).sum(1) / omega


def fake_score_loss(denoiser: Denoiser, x: Tensor, t: Tensor, predicted_x0: Tensor) -> Tensor:
    """Squared error of what the network predicts, the sum over C, H, W: [B, ...] each, t [B] -> [B].

    For a network that predicts eps it is the published |predicted - eps|^2 (arXiv:2409.11219), SNR times the squared error of x0. For a
    velocity on the rectified flow that would be (1 - t)^2 times the network's own error, which lets the fake score fall behind the student
    where there is much noise: measured in docs/methods/sfd.md.

    predicted_x0: the network's, guided or not, at a noised x.
    """
    error = predicted_x0 - x
    ratio = expand(denoiser.path.alpha(t) / denoiser.path.sigma(t), error)
    return denoiser.target(error, -ratio * error, t).square().flatten(1).sum(1)  # at x_t an error of x0 is -alpha / sigma times one of eps


@register("sfd")
@dataclass
class ScoreForgetting(Forgetting):
    """Score Forgetting Distillation (arXiv:2409.11219): a student that draws in one call what the teacher draws in many, but for a class.

    The student learns by the difference of the teacher's and a fake score's predictions, the fake score by denoising what the student
    draws. For the forgotten class the teacher is asked for another class, the override, so that the student draws that one instead. No
    data are needed: of a batch only the shape is used, labels are drawn from a prior. A text-to-image model forgets what the data set
    `concepts` says: its rows are prompts that stay, prompts to forget, and what is drawn instead.

    roles.teacher.weights names the run of the ORIGINAL model. To start from an earlier distillation (in two stages) give
    roles.student.weights and roles.fake_score.weights its run; the teacher stays the original.
    """

    roles: ClassVar[dict[str, Role]] = {
        "teacher": Frozen(given=True, flow=True),
        "fake_score": Trained(init="teacher", alike=True),
        "student": Trained(init="teacher", ema=True, alike=True),
    }
    generator: ClassVar[str | None] = "student"
    guarded: ClassVar[tuple[str, ...]] = ("loss/fake_score", "grad_norm/fake_score")

    takes_concepts: ClassVar[bool] = True

    override: int | str = option(UNIFORM, "drawn in place of a class: another, uniform over the others, or as the role judge reads it")
    alpha: float = option(1.2, "weight of the score identity's correction", source="arXiv:2404.04057, section 4")
    lam: PositiveFloat = option(0.01, "weight of the student's forget term", source="arXiv:2409.11219, code release")
    mu: PositiveFloat = option(0.01, "weight of the fake score's forget term", source="arXiv:2409.11219, code release")
    guidance: NonNegativeFloat = option(1.0, "of the teacher: null + w (conditional - null)", source="arXiv:2207.12598")
    fake_guidance: NonNegativeFloat = option(
        1.0, "of the fake score, learnt through and asked with it; as strong as the teacher's for text", source="arXiv:2406.01561"
    )
    condition_dropout: Fraction = option(
        0.0, "share of the rows on which the fake score learns without condition; .1 where it is guided", source="code release"
    )
    sigma: PositiveFloat = option(SIGMA, "noise-to-signal ratio at which the student is given pure noise", source="arXiv:2404.04057")
    sigma_min: PositiveFloat = option(0.137, "least noise-to-signal ratio at which scores are compared", source="code release")
    sigma_max: PositiveFloat = option(13.0, "greatest one; times are uniform between the two", source="code release")

    def __post_init__(self) -> None:
        if self.sigma_min >= self.sigma_max:
            raise ConfigError(f"{self.sigma_min} must be below sigma_max {self.sigma_max}", key="sigma_min")
        if self.fake_guidance != 1 and not self.condition_dropout:
            raise ConfigError("a guided fake score needs rows without condition to learn from; set it to 0.1", key="condition_dropout")
        if self.override == CLASSIFIER:
            vars(self)["roles"] = {**type(self).roles, "judge": Frozen(given=True, denoiser=False, classifier=True)}

    @property
    def reads_data(self) -> bool:
        return False

    def check(self, path: Path) -> None:
        if path.space.bounds is not None:
            raise ValueError("sfd needs samples that may move freely, not a space with walls; take free or dual")
        for key in ("sigma", "sigma_min", "sigma_max"):
            check_sigma(path, getattr(self, key), key)

    def own_sampler(self) -> Sampler:
        return OneStep(sigma=self.sigma)

    def check_sampler(self, sampler: Sampler) -> None:
        require_one_step(sampler, self.sigma)

    def check_data(self, data: Data) -> None:
        super().check_data(data)
        if self.prompted:
            if self.override != UNIFORM:
                raise ConfigError("the rules of the data set `concepts` say what is drawn instead; leave it out", key="override")
            return
        override = UNIFORM if self.override == CLASSIFIER else self.override
        self.overrides = override_weights(override, data.class_names, self.forgotten, f"{UNIFORM} or {CLASSIFIER}")

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("fake_score", self.fake_remain, self.fake_forget)
        yield Update("student", self.student_remain, self.student_forget)

    # Each term draws its own noise, times and labels. Losses are given to the optimiser as they are: sums over C, H, W.

    def fake_remain(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        loss = self._fake(nets, batch, noise, self.draw_remaining(batch, noise))
        return Loss(loss, {"fake_remain": loss.detach()})

    def fake_forget(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        loss = self._fake(nets, batch, noise, self.to_forget(batch, noise))
        return Loss(self.mu * loss, {"fake_forget": loss.detach()})

    def student_remain(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        asked = self.draw_remaining(batch, noise)
        loss = self._student(nets, batch, noise, asked, asked)
        return Loss(loss, {"student_remain": loss.detach()})

    def student_forget(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        if self.prompted:
            override: Condition | None = condition_of(part_of(batch, OVERRIDE))
        else:
            override = None if self.override == CLASSIFIER else {"label": draw_classes(noise, len(noise), self.overrides)}
        negative = condition_of(part_of(batch, NEGATIVE))
        loss = self._student(nets, batch, noise, self.to_forget(batch, noise), override, negative)
        return Loss(self.lam * loss, {"student_forget": loss.detach()})

    def _times(self, noise: Noise, path: Path) -> Tensor:
        return noise.uniform((len(noise),), time_at(path, self.sigma_min), time_at(path, self.sigma_max))

    def _fake(self, nets: Nets, batch: Batch, noise: Noise, asked: Condition | None) -> Tensor:
        path, shape = nets.student.path, tuple(batch["x"].shape)
        with torch.no_grad():
            x = generate(nets.student, path.draw_eps(noise, shape), self.sigma, asked)
        t = self._times(noise, path)
        x_t = path.perturb(x, path.draw_eps(noise, shape), t)
        if asked is not None and self.condition_dropout:
            asked = drop_condition(asked, noise.bernoulli(self.condition_dropout, (len(noise),)))
        x0 = guided_x0(nets.fake_score, x_t, t, asked, self.fake_guidance)
        return fake_score_loss(nets.fake_score, x, t, x0).mean()

    def _student(
        self, nets: Nets, batch: Batch, noise: Noise, asked: Condition | None, override: Condition | None, negative: Condition | None = None
    ) -> Tensor:
        """`override`: what the teacher is asked for; None: the class that the judge reads from the fake score's predictions."""
        path, shape = nets.student.path, tuple(batch["x"].shape)
        x_g = generate(nets.student, path.draw_eps(noise, shape), self.sigma, asked)
        t = self._times(noise, path)
        x_t = path.perturb(x_g, path.draw_eps(noise, shape), t)
        fake_x0 = guided_x0(nets.fake_score, x_t, t, asked, self.fake_guidance)
        if override is None and self.override == CLASSIFIER:
            override = {"label": self._read(nets.judge, path.space.decode(fake_x0))}
        teacher_x0 = guided_x0(nets.teacher, x_t, t, override, self.guidance, negative)
        return score_identity_loss(x_g, teacher_x0, fake_x0, self.alpha).mean()

    def _read(self, judge: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The likeliest class [B] of images [B, C, H, W], the forgotten one aside."""
        with torch.no_grad():
            logits = judge(x.clamp(-1, 1))
        return logits.index_fill(1, torch.tensor([self.forgotten], device=x.device), -torch.inf).argmax(1)
