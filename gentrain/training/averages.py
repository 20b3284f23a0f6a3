"""Averages of weights whose length is chosen after training (Karras et al. 2024, arXiv:2312.02696, section 3 and appendix C).

The average of gamma weighs the weights of time t' by p(t') = (gamma + 1) t'^gamma / t^(gamma + 1), up to the present time t. Its length is
told as sigma_rel, the standard deviation of t' / t under p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LONGEST = 0.28  # sigma_rel; that of gamma = 0, the plain mean over the whole run, is 1 / sqrt(12)


def gamma_of(length: float) -> float:
    """gamma of the average with that sigma_rel, below 1 / sqrt(12): sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (eq. 126)."""
    import numpy as np

    square = length**-2
    roots = np.roots([1, 7, 16 - square, 12 - square])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-6))


def power_decay(length: float, step: int) -> float:
    """beta of average <- beta average + (1 - beta) weights after step number `step`, from 1: (1 - 1 / step)^(gamma + 1) (eq. 127)."""
    return (1 - 1 / step) ** (gamma_of(length) + 1)


def overlap(time_a: float, gamma_a: float, time_b: float, gamma_b: float) -> float:
    """Integral of the product of two profiles (eq. 149 ff.)."""
    (first, gamma), (last, other) = sorted([(time_a, gamma_a), (time_b, gamma_b)])
    return (gamma + 1) * (other + 1) / (gamma + other + 1) * (first / last) ** other / last


def coefficients(times: Sequence[float], lengths: Sequence[float], time: float, length: float) -> tuple[Tensor, float]:
    """Of which sum of stored averages is nearest to the one of `length` at `time`, by least squares of the profiles.

    Args:
        times, lengths: of each stored average; no pair twice, times at most `time`.

    Returns:
        coefficients [N] float64, and what is missing: the norm of the difference over that of the profile.
    """
    # in units of the wanted time, so that the numbers are near 1
    stored = [(t / time, gamma_of(each)) for t, each in zip(times, lengths, strict=True)]
    wanted = (1.0, gamma_of(length))
    among = torch.tensor([[overlap(*a, *b) for b in stored] for a in stored], dtype=torch.float64)
    towards = torch.tensor([overlap(*a, *wanted) for a in stored], dtype=torch.float64)
    found = torch.linalg.lstsq(among, towards[:, None], driver="gelsd").solution[:, 0]
    whole = overlap(*wanted, *wanted)
    missing = (whole - 2 * found @ towards + found @ among @ found) / whole
    return found, max(0.0, float(missing)) ** 0.5
