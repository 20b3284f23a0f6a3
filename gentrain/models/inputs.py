"""Numbers that a network is given beside x, t and the label: the guidance weight it imitates, where a flow map ends, which call made the
sample, how its images were augmented."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gentrain.data.augmented import AUGMENTS
from gentrain.models.base import Condition

WIDTH = 256  # of the embeddings (arXiv:2310.04378, code release: time_cond_proj_dim)
_WIDTHS = {"guidance": WIDTH, "end": WIDTH, "step": WIDTH, "augment": AUGMENTS}
TIME_SCALE = "of the time that the embedding reads; .01 where a method takes derivatives by time (continuous_consistency, mean_flow)"
_TURNS = {"end": 0.25, "step": 4.0}  # radians per whole path; few of a flow map's end, for a derivative by time passes through them


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """[sin(1000 w o_j), cos(1000 w o_j)], o_j = 10000^(-j / (dim / 2 - 1)), j < dim / 2: [B] -> [B, dim] float32 or more.

    As latent consistency models embed the guidance weight (arXiv:2310.04378, code release). The phases reach 1.5e4 rad: they are never
    computed in half precision.

    Raises ValueError when dim is not even and at least 4.
    """
    if dim < 4 or dim % 2:
        raise ValueError(f"dim must be even and at least 4, got {dim}")
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    exponent = torch.arange(dim // 2, dtype=w.dtype, device=w.device) / (dim // 2 - 1)
    phase = 1000 * w[:, None] * (-math.log(10_000) * exponent).exp()
    return torch.cat([phase.sin(), phase.cos()], 1)


def interval_embedding(length: Tensor, dim: int, fastest: float = 4.0) -> Tensor:
    """sin and cos of a length in [0, 1] (share of the path) at frequencies from fastest / 8 to fastest, [B] -> [B, dim] float32 or more."""
    length = length.to(torch.promote_types(length.dtype, torch.float32))
    frequencies = fastest * torch.logspace(-3, 0, dim // 2, base=2, dtype=length.dtype, device=length.device)
    phase = length[:, None] * frequencies
    return torch.cat([phase.sin(), phase.cos()], 1)


class Inputs(nn.Module):
    """The sum of what each input adds to a network's embedding, zero at first: a network that gains inputs is the one it was.

    | input    | entry of the condition                            | where it is absent     |
    |----------|---------------------------------------------------|------------------------|
    | guidance | [B] weight w of conditional + w (conditional - null) | adds nothing        |
    | end      | [B] network time at which the flow map ends       | t: the velocity itself |
    | step     | [B] network time of the call that made the sample | t                      |
    | augment  | [B, 9] what was done to the image, see data.augmented | adds nothing: an image as it is |
    """

    def __init__(self, names: Sequence[str], width: int):
        super().__init__()
        if unknown := set(names) - set(_WIDTHS):
            raise ValueError(f"unknown input {min(unknown)!r}; there are: {', '.join(_WIDTHS)}")
        self.projections = nn.ModuleDict({name: nn.Linear(_WIDTHS[name], width, bias=False) for name in names})
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, t: Tensor, condition: Condition | None) -> Tensor | float:
        """t [B] network time -> [B, width] in the weights' dtype, or 0."""
        condition, added = condition or {}, 0.0
        for name, projection in self.projections.items():
            if name in _TURNS:
                embedded = interval_embedding((t - condition.get(name, t)) / 1000, WIDTH, _TURNS[name])
            elif name not in condition:
                continue
            elif name == "augment":
                embedded = condition[name]
            else:
                embedded = guidance_embedding(condition[name], WIDTH)
            added = added + projection(embedded.to(next(self.parameters()).dtype))
        return added
