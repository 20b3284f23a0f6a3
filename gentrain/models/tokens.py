"""TokenModel: a network of tokens as methods and samplers see it, and the order in which it says tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, interpolate

from gentrain.models.base import Condition

Cache = dict[int, tuple[Tensor, Tensor]]  # block -> keys and values of the positions that were read before


class TokenModel:
    """What is to tokens as a `Denoiser` is to numbers: log p(x | c) = sum over t of log softmax(logits_t)[x_t], each given earlier tokens.

    Args:
        network: (tokens [B, T] int64, condition or None) -> logits [B, T, V], teacher forced: those of a token depend on earlier groups
            alone. With `cache` the tokens are the first n, whole groups, and the logits those of the next group.
    """

    def __init__(self, network: Callable[..., Tensor]):
        self.network = network

    def logits(self, tokens: Tensor, condition: Condition | None = None) -> Tensor:
        """[B, T] int64 -> [B, T, V], float32 or more."""
        found = self.network(tokens, condition)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def log_prob(self, tokens: Tensor, condition: Condition | None = None) -> Tensor:
        """log p of each row, in nats, the SUM over its tokens: [B, T] int64 -> [B], float32 or more."""
        return self.token_log_prob(tokens, condition).sum(1)

    def token_log_prob(self, tokens: Tensor, condition: Condition | None = None) -> Tensor:
        """log p of each token given earlier ones, in nats: [B, T] int64 -> [B, T], float32 or more."""
        return -cross_entropy(self.logits(tokens, condition).transpose(1, 2), tokens, reduction="none")

    def next_logits(self, tokens: Tensor, condition: Condition | None, cache: Cache) -> Tensor:
        """Of the group that follows tokens [B, n]: [B, its size, V] float32. The cache, empty at first, goes with the same rows."""
        return self.network(tokens, condition, cache=cache).float()


def groups_of(length: int, scales: Sequence[int]) -> tuple[int, ...]:
    """How many of `length` tokens are said together: one, or all of a scale. Raises ValueError where the sides do not fit."""
    if not scales:
        return (1,) * length
    groups = tuple(side**2 for side in scales)
    if sum(groups) != length or list(scales) != sorted(set(scales)):
        raise ValueError(f"scales {list(scales)} make {sum(groups)} tokens, and samples have {length}; name growing sides of that many")
    return groups


def widening(side: int, full: int) -> Tensor:
    """From a side x side grid to a full x full one, bilinear: [full^2, side^2], rows sum to 1."""
    each = torch.eye(side**2).reshape(side**2, 1, side, side)
    return interpolate(each, size=(full, full), mode="bilinear", align_corners=False).flatten(1).T


def narrowing(side: int, full: int) -> Tensor:
    """From a full x full grid to a side x side one, means over areas: [side^2, full^2], rows sum to 1."""
    return adaptive_avg_pool2d(torch.eye(full**2).reshape(full**2, 1, full, full), side).flatten(1).T


def given(length: int, scales: Sequence[int]) -> Tensor:
    """What the network reads at each position, as weights of what the tokens mean: [T, T]; the first group reads nothing.

    The token before, or the sum of the earlier scales, widened to the last one's grid and narrowed to that of the position
    (arXiv:2404.02905, section 3.2).
    """
    weights = torch.zeros(length, length)
    if not scales:
        weights[1:, :-1] = torch.eye(length - 1)
        return weights
    ends = torch.tensor([0, *groups_of(length, scales)]).cumsum(0).tolist()
    for k, side in enumerate(scales):
        for j, earlier in enumerate(scales[:k]):
            block = narrowing(side, scales[-1]) @ widening(earlier, scales[-1])
            weights[ends[k] : ends[k + 1], ends[j] : ends[j + 1]] = block
    return weights


def visible(groups: Sequence[int]) -> Tensor:
    """Which positions (columns) each position (row) looks at: those of its own group and of earlier ones, [T, T] bool."""
    number = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups))
    return number[:, None] >= number
