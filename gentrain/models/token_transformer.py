"""Transformer that says how likely tokens are: next token, or next scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from gentrain.config import Fraction, option, register
from gentrain.data.base import Data
from gentrain.data.tokens import TokenData
from gentrain.models.base import Codec, Condition, Model
from gentrain.models.conditional import class_index
from gentrain.models.tokens import Cache, TokenModel, given, groups_of, visible
from gentrain.models.vq import VQNetwork, load_vq
from gentrain.paths.base import Path

if TYPE_CHECKING:
    from gentrain.models.denoiser import Prediction


@register("token_transformer")
@dataclass
class TokenTransformer(Model):
    """Class-conditional transformer of tokens: pre-norm blocks, learned positions, the class added at every position.

    Without `scales` a token is said given those before it; with them all tokens of a scale are said together, given the smaller scales
    (arXiv:2404.02905).
    """

    of_tokens: ClassVar[bool] = True

    vocabulary: PositiveInt = option(help="number of values that a token has: that of the data")
    scales: tuple[PositiveInt, ...] = option((), "sides of the grids whose tokens follow each other: those of the data; none = next token")
    layers: PositiveInt = option(4, "transformer blocks")
    heads: PositiveInt = option(4, "attention heads")
    head_dim: PositiveInt = option(32, "channels per head; the width is heads * head_dim")
    dropout: Fraction = option(0.0, "share of what each half of a block adds that is dropped, in methods that drop")

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """A `TokenNetwork`. Raises ValueError when samples are not (T,) or the scales make another number of tokens."""
        if len(shape) != 1:
            raise ValueError(f"token_transformer is for tokens (T,), got samples of shape {shape}; a stage `tokenize` makes them of images")
        return TokenNetwork(self, shape[0], num_classes)

    def seen(self, network: Callable[..., Tensor], path: Path, prediction: Prediction) -> TokenModel:
        return TokenModel(network)

    def codec(self, data: Data) -> Codec:
        if not isinstance(data, TokenData):
            raise ValueError(f"token_transformer is for tokens, not for {data.registered_name}; a stage `tokenize` makes them of images")
        if (data.vocabulary, tuple(data.scales)) != (self.vocabulary, self.scales):
            raise ValueError(
                f"the data have {data.vocabulary} values of a token and scales {list(data.scales)}, the model {self.vocabulary} and "
                f"{list(self.scales)}; set model.vocabulary and model.scales to the data's"
            )
        return TokenCodec(data)


class TokenCodec(Codec):
    """Tokens stay as they are; those of images are decoded by what made them."""

    def __init__(self, data: TokenData):
        super().__init__(data)
        self.tokenizer, self.device = data.tokenizer, torch.device("cpu")
        if self.tokenizer is not None:
            self.decoded_shape = data.decoded

    def to(self, device: torch.device) -> Codec:
        self.device = device
        return self

    @cached_property
    def _network(self) -> VQNetwork:
        assert self.tokenizer is not None
        return load_vq(self.tokenizer).to(self.device).eval().requires_grad_(False)

    def decode(self, x: Tensor) -> Tensor:
        return x if self.tokenizer is None else self._network.decode(x)


class TokenNetwork(nn.Module):
    """forward: tokens [B, T] int64, condition {"label": [B] int64, -1 = null} -> logits [B, T, V], see `TokenModel`."""

    given: Tensor
    visible: Tensor

    def __init__(self, model: TokenTransformer, length: int, num_classes: int):
        super().__init__()
        width = model.heads * model.head_dim
        self.groups, self.num_classes = groups_of(length, model.scales), num_classes
        self.meaning = nn.Embedding(model.vocabulary, width)
        self.label = nn.Embedding(num_classes + 1, width)
        self.position = nn.Parameter(torch.empty(length, width))
        self.blocks = nn.ModuleList(Block(width, model.heads, model.dropout) for _ in range(model.layers))
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, model.vocabulary)
        for weight in (self.meaning.weight, self.label.weight, self.position):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.logits.weight)  # all tokens equally likely at first
        nn.init.zeros_(self.logits.bias)
        with torch.device("cpu"):
            self.register_buffer("given", given(length, model.scales), persistent=False)
            self.register_buffer("visible", visible(self.groups), persistent=False)

    def forward(self, tokens: Tensor, condition: Condition | None = None, cache: Cache | None = None) -> Tensor:
        first, last = (0, len(self.position)) if cache is None else self._next_group(tokens.shape[1])
        known = self.given[first:last, : tokens.shape[1]] @ self.meaning(tokens)
        hidden = known + self.position[first:last] + self.label(class_index(condition, tokens, self.num_classes))[:, None]
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, self.visible[first:last, :last], cache, number)
        return self.logits(self.norm(hidden))

    def _next_group(self, known: int) -> tuple[int, int]:
        end = 0
        for size in self.groups:
            if end == known:
                return end, end + size
            end += size
        raise ValueError(f"{known} tokens are not whole groups before the last one")


class Block(nn.Module):
    """x [B, n, W], the last n of the positions that mask [n, all] lets them look at; `cache` holds the others'."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.hidden_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mixed = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, cache: Cache | None, number: int) -> Tensor:
        q, k, v = self.attention(self.attention_norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            if number in cache:
                k, v = (torch.cat([before, new], 2) for before, new in zip(cache[number], (k, v), strict=True))
            cache[number] = (k, v)
        x = x + self.dropout(self.mixed(scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)))
        return x + self.dropout(self.hidden(self.hidden_norm(x)))
