"""What methods share whose student is led by the difference of two scores, the teacher's and its samples' own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gentrain.config import ConfigError
from gentrain.methods.base import Loss, Method, Nets
from gentrain.methods.sfd import score_identity_loss
from gentrain.models.base import Condition
from gentrain.models.denoiser import drop_condition
from gentrain.noise import Noise
from gentrain.paths.base import Path, TimeLaw, expand
from gentrain.samplers.guidance import guided_x0

BINS = 10  # of times, equally likely
_LEAST_ERROR = 1e-6  # of the teacher, added to what gradients are divided by


def pseudo_target_loss(x_g: Tensor, gradient: Tensor) -> Tensor:
    """Half the mean of (x_g - target)^2, target = x_g - gradient held fixed: its gradient is gradient / numel. [B, ...] each -> scalar.

    In float32 at least.
    """
    x_g = x_g.to(torch.promote_types(x_g.dtype, torch.float32))
    return (x_g - (x_g - gradient).detach()).square().mean() / 2


def per_error(x_g: Tensor, x0: Tensor) -> Tensor:
    """1 / (mean over C, H, W of |x_g - x0| + 1e-6), what DMD weighs gradients with: [B, ...] each -> [B], without gradient."""
    return 1 / ((x_g - x0).detach().abs().flatten(1).mean(1) + _LEAST_ERROR)


def decoupled_guidance(
    fake_x0: Tensor,
    teacher_x0: Tensor,
    conditional_x0: Tensor,
    null_x0: Tensor,
    strength: float,
    fidelity_weight: Tensor,
    guidance_weight: Tensor,
) -> Tensor:
    """fidelity_weight (fake - teacher) - strength guidance_weight (conditional - null): the gradient [B, ...] for a pseudo-target.

    The first bracket leads to the teacher's law, the second to where its implicit classifier is surer of the condition. With both at one
    time, equal weights, strength = w - 1 and teacher = conditional it is the gradient towards the teacher guided by w.

    Args:
        fake_x0, teacher_x0: x0 predictions at one noised sample, [B, ...].
        conditional_x0, null_x0: the teacher's at another noised form of that sample, with and without the condition, [B, ...].
        fidelity_weight, guidance_weight: [B].
    """
    fidelity = expand(fidelity_weight, fake_x0) * (fake_x0 - teacher_x0)
    return fidelity - strength * expand(guidance_weight, null_x0) * (conditional_x0 - null_x0)


@dataclass(frozen=True)
class Noised:
    """Times t [B] and which of the equally likely bins they fall in, the noise eps and the noised samples x_t [B, ...]."""

    t: Tensor
    bins: Tensor
    eps: Tensor
    x_t: Tensor


def noised_by(times: TimeLaw, path: Path, x_g: Tensor, noise: Noise) -> Noised:
    """Samples x_g [B, ...] with noise, at times of the law."""
    uniform = noise.uniform((len(x_g),))
    t, eps = times.sample(uniform, path), path.draw_eps(noise, tuple(x_g.shape))
    return Noised(t, (uniform * BINS).long(), eps, path.perturb(x_g, eps, t))


class LedByScores(Method):
    """A method with roles `teacher`, `fake_score` and `student`, and fields of these names."""

    generator_loss: str
    alpha: float
    guidance: float
    guidance_times: TimeLaw | None

    def check_times(self) -> None:
        """Raises ConfigError where there are times of the guidance and they mean nothing."""
        if self.guidance_times is None:
            return
        if self.generator_loss == "sid":
            raise ConfigError("the loss sid has its guidance in its teacher; leave guidance_times out", key="guidance_times")
        if self.guidance == 1:
            raise ConfigError("guidance 1 is none; leave them out, or set guidance", key="guidance_times")

    def led_by_scores(
        self,
        nets: Nets,
        x_g: Tensor,
        at: Noised,
        known: Condition | None,
        told: Condition | None,
        noise: Noise,
        counts: Tensor | None = None,
    ) -> Loss:
        """The part of the student's loss that comes of the difference of the scores at its noised samples.

        Args:
            known: the teacher's condition. told: the fake score's.
            counts: [B], by which each row's whole gradient is multiplied, guidance and all (not for sid); None = 1.
        """
        through = self.generator_loss == "sid"  # whose gradient flows through both predictions
        with torch.set_grad_enabled(through):
            fake_x0 = nets.fake_score.x0(at.x_t, at.t, told)
            teacher_x0 = guided_x0(nets.teacher, at.x_t, at.t, known, self.guidance if self.guidance_times is None else 1.0)
        if through:
            value = score_identity_loss(x_g, teacher_x0, fake_x0, self.alpha).mean() / x_g[0].numel()
        else:
            gradient = self._gradient(nets, x_g, fake_x0, teacher_x0, at.t, known, noise)
            value = pseudo_target_loss(x_g, gradient if counts is None else expand(counts, x_g) * gradient)
        # the losses are no distances: this tells how far the student's law is from the teacher's
        return Loss(value, {"score_gap": (fake_x0 - teacher_x0).detach().abs().mean()})

    def _weight(self, nets: Nets, x_g: Tensor, teacher_x0: Tensor, t: Tensor) -> Tensor:
        return nets.student.path.alpha(t) if self.generator_loss == "vsd" else per_error(x_g, teacher_x0)

    @torch.no_grad()
    def _gradient(
        self, nets: Nets, x_g: Tensor, fake_x0: Tensor, teacher_x0: Tensor, t: Tensor, known: Condition | None, noise: Noise
    ) -> Tensor:
        """What the student's samples are moved against, [B, ...]."""
        weight = self._weight(nets, x_g, teacher_x0, t)
        if self.guidance_times is None:
            return expand(weight, x_g) * (fake_x0 - teacher_x0)
        at = noised_by(self.guidance_times, nets.student.path, x_g, noise)
        # only what guides is dropped, as where guidance is tied: how an image was augmented is known to both
        nothing = None if known is None else drop_condition(known, torch.ones_like(at.bins, dtype=torch.bool))
        conditional, null = nets.teacher.x0(at.x_t, at.t, known), nets.teacher.x0(at.x_t, at.t, nothing)
        there = self._weight(nets, x_g, conditional, at.t)
        return decoupled_guidance(fake_x0, teacher_x0, conditional, null, self.guidance - 1, weight, there)
