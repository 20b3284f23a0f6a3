"""Roots of many increasing functions of one variable at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_MOST_STEPS = 100  # bisection alone would need 60, Newton needs 4 to 8


def increasing_root(function: Callable[[Tensor], tuple[Tensor, Tensor]], low: Tensor, high: Tensor, guess: Tensor) -> Tensor:
    """u with function(u) = 0 in float64, by Newton's method, bisecting where a step leaves the bracket.

    Args:
        function: elementwise and increasing: u -> (value, derivative).
        low, high: function(low) <= 0 <= function(high).
        guess: where to start, in [low, high].
    """
    u = guess
    for _ in range(_MOST_STEPS):
        value, derivative = function(u)
        low, high = torch.where(value <= 0, u, low), torch.where(value >= 0, u, high)
        step = u - value / derivative
        step = torch.where((step >= low) & (step <= high), step, (low + high) / 2)
        done = (step - u).abs() <= 1e-11 * (1 + u.abs())  # convergence is quadratic: the error left is rounding
        u = step
        if bool(done.all()):
            break
    return u
