"""Classifier-free guidance (arXiv:2207.12598)."""

from __future__ import annotations

import torch
from torch import Tensor

from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser, drop_condition


def guided_x0(
    denoiser: Denoiser, x_t: Tensor, t: float | Tensor, condition: Condition | None, weight: float, negative: Condition | None = None
) -> Tensor:
    """null + weight (conditional - null) of the x0 prediction [B, ...] at time t, one number or [B]; one network call.

    Every prediction is affine in the network's output, so guiding x0 is guiding any of them. Without a condition, or with weight 1,
    there is nothing to mix and the batch is not doubled. negative: a condition with the same entries that stands for the null.
    """
    times = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device).expand(len(x_t))
    if condition is None or weight == 1:
        return denoiser.x0(x_t, times, condition)
    null_condition = negative or drop_condition(condition, torch.ones(len(x_t), dtype=torch.bool, device=x_t.device))
    both = {key: torch.cat([value, null_condition[key]]) for key, value in condition.items()}
    conditional, null = denoiser.x0(torch.cat([x_t, x_t]), torch.cat([times, times]), both).chunk(2)
    return null + weight * (conditional - null)
