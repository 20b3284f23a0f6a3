"""Joint distribution matching: the terms by which a one-step student is led to data and to a condition separately.

The reverse KL divergence of joint laws p_G(x, c) = p(c) p_G(x | c) and p(x) p(c | x) is exactly

    KL(p_G(x) || p(x)) - E log p(c | x) - H_G(c | x)

The bound leaves the entropy out: fidelity, which is `distribution_matching.vsd_loss` with a fake score that does NOT see c, plus condition.
"""

from __future__ import annotations

from torch import Tensor

from gentrain.paths.base import expand


def condition_loss(control: Tensor, extracted: Tensor, deviation: float) -> Tensor:
    """-log p(c | x) but for a constant, |c - h(x)|^2 / (2 deviation^2) summed over all but rows: [B, ...] each -> [B].

    Args:
        control: c, what was asked for.
        extracted: h(x), what the sample shows; its gradient reaches the student.
        deviation: tau, of the noise that c is taken to have, in c's units.
    """
    return (control - extracted).square().flatten(1).sum(1) / (2 * deviation**2)


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
