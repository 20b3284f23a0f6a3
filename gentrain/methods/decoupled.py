"""Guidance of a teacher that is compared with a student's own score: tied to that comparison, or apart from it."""

from __future__ import annotations

from torch import Tensor

from gentrain.paths.base import expand


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
