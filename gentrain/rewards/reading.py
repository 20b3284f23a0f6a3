"""How a network is read as a scalar: of an image, of a latent, or of any other sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from gentrain.models.base import Condition

Read = Literal["class_logit", "mean_output"]


def read_scalar(read: Read, network: Callable[..., Tensor], x: Tensor, condition: Condition | None) -> Tensor:
    """x [B, ...] -> [B] float32.

    class_logit: the logit of the class asked for, of a network that classifies; rows without a class (-1, or no condition) have the mean
    of the logits. mean_output: the mean of what a network for denoising puts out at time 0, with the condition as an input.
    """
    if read == "mean_output":
        return network(x, x.new_zeros(len(x)), condition).float().flatten(1).mean(1)
    logits = network(x).float()
    if condition is None:
        return logits.mean(1)
    label: Tensor = condition["label"]
    return torch.where(label < 0, logits.mean(1), logits.gather(1, label.clamp(min=0)[:, None]).squeeze(1))
