"""How a network is read as a scalar: of an image, of a latent, or of any other sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gentrain.models.base import Condition
from gentrain.models.towers import unpack

Read = Literal["class_logit", "mean_output"]


def matched(towers: Callable[..., Tensor], images: Tensor, tokens: Tensor) -> Tensor:
    """How well images [B, C, H, W] match their texts, tokens as `Towers.read` gives them: exp(min(t', ln 100)) cosine, [B] float32.

    The logit of the sigmoid loss without its bias, which cancels between images of one text.
    """
    found = unpack(towers(images, tokens))
    scale = found.logit_scale.clamp(max=math.log(100)).exp()
    return scale * cosine_similarity(found.image, found.text, dim=1)


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
