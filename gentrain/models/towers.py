"""Two towers, image and text, whose embeddings are to be alike where picture and caption belong together."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import normalize, pad
from torch.utils.checkpoint import checkpoint

from gentrain.config import option, register
from gentrain.data.base import Data
from gentrain.models.base import Codec, Model
from gentrain.models.cnn import Classifier
from gentrain.noise import Noise

INITIAL_SCALE = math.log(10)  # arXiv:2303.15343, section 3.2
_GRAMS = (3, 4, 5)  # letters; arXiv:1607.04606 takes 3 to 6


class Embeddings(NamedTuple):
    """image, text: [B, D], not normalised. logit_scale (t'), logit_bias (b): [1]."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor


def unpack(output: Tensor) -> Embeddings:
    """What the forward of the towers gives, [B, 2 D + 2]: engines hand on one tensor."""
    image, text, scalars = output.split([(output.shape[1] - 2) // 2] * 2 + [2], 1)
    return Embeddings(image, text, scalars[0, :1], scalars[0, 1:])


def pieces(caption: str, buckets: int) -> list[int]:
    """The caption's words and the groups of 3 to 5 letters in them, as numbers in [1, buckets]: unknown words share groups with known ones.

    arXiv:1607.04606: words are padded with < and >; the numbers are hashes (CRC-32).
    """
    found = []
    for word in caption.lower().split():
        marked = f"<{word}>"
        grams = [marked[i : i + size] for size in _GRAMS for i in range(len(marked) - size + 1)]
        found += [zlib.crc32(part.encode()) % buckets + 1 for part in (marked, *grams)]
    return found


class CaptionCodec(Codec):
    """Adds to a batch what a text tower reads: "tokens" [B, L] int64, 0 = nothing."""

    def __init__(self, data: Data, buckets: int):
        super().__init__(data)
        if not data.captions:
            raise ValueError(f"the towers need data with captions, which {data.registered_name} has not; use emoji, say")
        rows = [torch.tensor(pieces(caption, buckets), dtype=torch.int64) for caption in data.captions]
        longest = max(len(row) for row in rows)
        self.tokens = torch.stack([pad(row, (0, longest - len(row))) for row in rows])

    def to(self, device: torch.device) -> Codec:
        self.tokens = self.tokens.to(device)
        return self

    def encode(self, batch: dict[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        return {**batch, "tokens": self.tokens[batch["caption"]]}


@register("towers")
@dataclass
class Towers(Model):
    """A convolutional image tower and a text tower over hashed words and groups of letters, with the loss's temperature and bias."""

    width: PositiveInt = option(128, "entries of an embedding")
    channels: tuple[PositiveInt, ...] = option((16, 32, 64), "of the image tower's levels; each level after the first halves the grid")
    norm_groups: PositiveInt = option(8, "groups of the image tower's normalisation; divides every level's channels")
    buckets: PositiveInt = option(4096, "numbers that words and groups of letters are hashed to")
    initial_bias: float = option(
        -10.0, "of the logits; for a batch of N pairs -log(N - 1) are the odds of a match", source="arXiv:2303.15343, section 3.2"
    )
    rows_at_once: NonNegativeInt = option(
        0, "pairs whose activations are held at once, the rest being computed again in the backward pass (arXiv:2101.06983); 0 = all"
    )

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """A `TwoTowers`. Raises ValueError when shape is not (C, H, W) or channels do not fit."""
        if len(shape) != 3:
            raise ValueError(f"the towers are for images (C, H, W), got samples of shape {shape}")
        if wrong := [width for width in self.channels if width % self.norm_groups]:
            raise ValueError(f"channels {wrong[0]} is not divisible by norm_groups {self.norm_groups}; change one of them")
        if not self.channels or min(shape[1:]) < 2 ** len(self.channels):
            raise ValueError(f"images of {shape[1]}x{shape[2]} pixels do not fit {len(self.channels)} levels of channels")
        image = Classifier(shape[0], self.width, self.channels, self.norm_groups)
        return TwoTowers(image, TextTower(self.buckets, self.width), self.initial_bias, self.rows_at_once)

    def codec(self, data: Data) -> Codec:
        return CaptionCodec(data, self.buckets)


class TextTower(nn.Module):
    """tokens [B, L] int64, 0 = nothing -> [B, width]: the sum of what they mean, normalised, through two layers."""

    def __init__(self, buckets: int, width: int):
        super().__init__()
        self.meaning = nn.Embedding(buckets + 1, width)
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        total = (self.meaning(tokens) * (tokens > 0).unsqueeze(2)).sum(1)
        scale = math.sqrt(total.shape[1])
        hidden = normalize(total, dim=1, eps=1e-6) * scale
        return hidden + self.layers(hidden)


class TwoTowers(nn.Module):
    """forward: x [B, C, H, W] in [-1, 1], tokens [B, L] -> [B, 2 D + 2], see `unpack`.

    Args:
        initial_bias, rows_at_once: see `Towers`. The loss sees the batch whole, so that it may have more pairs than fit.
    """

    def __init__(self, image: nn.Module, text: nn.Module, initial_bias: float, rows_at_once: int):
        super().__init__()
        self.image, self.text, self.rows_at_once = image, text, rows_at_once
        self.logit_scale = nn.Parameter(torch.tensor([INITIAL_SCALE]))
        self.logit_bias = nn.Parameter(torch.tensor([initial_bias]))
        for p in self.parameters():
            if p.ndim < 2:  # biases, normalisation, temperature
                p.decays = False  # type: ignore[attr-defined]

    def _embed(self, x: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat([self.image(x), self.text(tokens)], 1)

    def _parts(self, x: Tensor, tokens: Tensor) -> Iterator[Tensor]:
        for part in zip(x.split(self.rows_at_once), tokens.split(self.rows_at_once), strict=True):
            yield checkpoint(self._embed, *part, use_reentrant=False)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        cached = 0 < self.rows_at_once < len(x) and torch.is_grad_enabled()
        both = torch.cat(list(self._parts(x, tokens))) if cached else self._embed(x, tokens)
        scalars = torch.cat([self.logit_scale, self.logit_bias])
        return torch.cat([both.float(), scalars.float().expand(len(x), 2)], 1)
