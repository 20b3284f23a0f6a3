"""Sampling from token models: token after token, or scale after scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from gentrain.config import Fraction, option, register
from gentrain.models.base import Condition
from gentrain.models.denoiser import drop_condition
from gentrain.models.tokens import Cache, TokenModel
from gentrain.noise import Noise
from gentrain.samplers.base import Sampler


def truncated(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """logits [..., V] with -inf for all but the top_k likeliest values, and for those beyond a share top_p of what then is left.

    The likeliest ones whose probabilities first add up to top_p are kept (arXiv:1904.09751), one at least.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[..., -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, places = logits.sort(-1, descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p  # what comes before this value is enough
        beyond[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, places, beyond), -torch.inf)
    return logits


def draw(logits: Tensor, noise: Noise) -> Tensor:
    """A value of each law softmax(logits): [B, n, V] -> [B, n] int64, by the largest of logits + Gumbel noise (arXiv:1411.0030)."""
    gumbel = -(-noise.uniform(tuple(logits.shape)).log()).log()
    return (logits + gumbel).argmax(-1)


@register("autoregressive")
@dataclass(kw_only=True)
class Autoregressive(Sampler):
    """Draws each token, or all tokens of a scale, given those before."""

    of_tokens: ClassVar[bool] = True

    steps: PositiveInt = option(1, "passes over the tokens: one")
    temperature: PositiveFloat = option(1.0, "logits are divided by it")
    top_k: PositiveInt | None = option(None, "only so many likeliest values are drawn; null = all")
    top_p: Fraction | None = option(
        None, "only the likeliest values are drawn whose probabilities add up to it; null = all", source="arXiv:1904.09751"
    )

    def __post_init__(self) -> None:
        if self.steps != 1:
            raise ValueError(f"autoregressive passes over the tokens once, not {self.steps} times; leave steps out")

    @property
    def other_law(self) -> str | None:
        return super().other_law or next(iter(self._changed), None)

    @property
    def told(self) -> str:
        return ", ".join([self.registered_name, f"guidance {self.guidance:g}", *self._changed])

    @property
    def _changed(self) -> list[str]:
        changed = {"temperature": self.temperature != 1, "top_k": self.top_k is not None, "top_p": self.top_p not in (None, 1)}
        return [f"{key} {getattr(self, key):g}" for key, value in changed.items() if value]

    def sample(  # type: ignore[override]
        self, model: TokenModel, shape: tuple[int, ...], noise: Noise, condition: Condition | None = None
    ) -> Tensor:
        """Tokens [B, T] int64 of `shape`. Guidance mixes logits: null + w (conditional - null) (arXiv:2404.02905, code release)."""
        rows, length = shape
        tokens = torch.empty(rows, 0, dtype=torch.int64, device=noise.rows.device)
        guided = condition is not None and self.guidance != 1
        if condition is not None and guided:
            null = drop_condition(condition, torch.ones(rows, dtype=torch.bool, device=tokens.device))
            condition = {key: torch.cat([value, null[key]]) for key, value in condition.items()}
        cache: Cache = {}
        while tokens.shape[1] < length:
            if guided:
                conditional, unconditional = model.next_logits(torch.cat([tokens, tokens]), condition, cache).chunk(2)
                logits = unconditional + self.guidance * (conditional - unconditional)
            else:
                logits = model.next_logits(tokens, condition, cache)
            tokens = torch.cat([tokens, draw(truncated(logits / self.temperature, self.top_k, self.top_p), noise)], 1)
        return tokens
