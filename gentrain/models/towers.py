"""Two towers, image and text, whose embeddings are to be alike where picture and caption belong together."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path as FilePath
from typing import Annotated, ClassVar, Literal, NamedTuple, get_args

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize, pad
from torch.utils.checkpoint import checkpoint

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data
from gentrain.models.base import Codec, Model
from gentrain.models.cnn import Classifier
from gentrain.models.image_text import MINILM, Side
from gentrain.noise import Noise

INITIAL_SCALE = math.log(10)  # arXiv:2303.15343, section 3.2
_GRAMS = (3, 4, 5)  # letters; arXiv:1607.04606 takes 3 to 6
_TEXTS_AT_ONCE = 64
_AT_ONCE = 256


class Embeddings(NamedTuple):
    """image, text: [B, D], not normalised. logit_scale (t'), logit_bias (b): [1]."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor


SideName = Literal["image", "text"]


def unpack(output: Tensor, locked: SideName | None = None) -> Embeddings:
    """What the forward of the towers gives, [B, 2 D + 2]: engines hand on one tensor, in which a locked side has a gradient as well.

    Args:
        locked: the side that is to have none.
    """
    image, text, scalars = output.split([(output.shape[1] - 2) // 2] * 2 + [2], 1)
    found = Embeddings(image, text, scalars[0, :1], scalars[0, 1:])
    return found if locked is None else found._replace(**{locked: getattr(found, locked).detach()})


def locked_side(batch: Mapping[str, Tensor]) -> SideName | None:
    """The locked side of the towers whose codec encoded the batch."""
    return next((side for side in get_args(SideName) if f"locked/{side}" in batch), None)


def embedded(towers: nn.Module, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised embeddings, without gradient, of any numbers of images and of texts: x [N, C, H, W], tokens [M, ...] -> [N, D], [M, D]."""
    with torch.no_grad():
        image = torch.cat([towers.image(part) for part in x.split(_AT_ONCE)])  # type: ignore[operator]
        text = torch.cat([towers.text(part) for part in tokens.split(_AT_ONCE)])  # type: ignore[operator]
    return normalize(image.float(), dim=1), normalize(text.float(), dim=1)


def matches(found: Embeddings) -> Tensor:
    """How well each image matches its text: exp(min(t', ln 100)) cosine, [B] float32: the sigmoid loss's logit without b."""
    scale = found.logit_scale.clamp(max=math.log(100)).exp()
    return scale * cosine_similarity(found.image, found.text, dim=1)


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
    """Adds to a batch what the text tower reads of its captions: "tokens" [B, L] int64, or [B, D] embeddings of a locked text tower.

    The name of an entry without numbers, "locked/image" or "locked/text" [B, 0], tells which tower is locked.
    """

    def __init__(self, model: Towers, data: Data):
        super().__init__(data)
        if not data.captions:
            raise ValueError(f"the towers need data with captions, which {data.registered_name} has not; use emoji, say")
        self.model, self.device = model, torch.device("cpu")

    def to(self, device: torch.device) -> Codec:
        self.device = device
        return self

    @cached_property
    def tokens(self) -> Tensor:
        """Of every caption of the data."""
        return self.model.read(list(self.data.captions), self.device)

    def encode(self, batch: dict[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        return self._with(batch, self.tokens[batch["caption"]])

    def shaped(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.model.lock == "text":
            return self._with(batch, torch.zeros(len(batch["x"]), self.model.entries))
        return super().shaped(batch)

    def _with(self, batch: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
        lock = self.model.lock
        return {**batch, "tokens": tokens, **({} if lock is None else {f"locked/{lock}": tokens.new_empty(len(tokens), 0)})}


@register("towers")
@dataclass
class Towers(Model):
    """An image tower and a text tower with the loss's temperature and bias: each pretrained, or small and from scratch.

    A pretrained side is a CLIP, a SigLIP, a vision transformer or a text encoder of transformers: a directory that save_pretrained wrote,
    with tokenizer or preprocessor_config.json, or a repository on the hub. Its weights do not decay (arXiv:2303.15343, section 4.4).
    """

    decoded: ClassVar[bool] = True
    read_by: ClassVar[tuple[str, ...]] = (
        "image", "image_revision", "text", "text_revision", "lock", "width", "channels", "norm_groups", "buckets",
    )  # fmt: skip

    width: PositiveInt | None = option(
        None, "entries of an embedding; null = as many as the locked side, else a pretrained side has, else 128; others get a projection"
    )
    image: str | None = option(None, "pretrained image side; null = a convolutional tower from scratch")
    text: str | None = option(
        None,
        "pretrained text side, minilm = the packaged encoder; null = a tower from scratch over hashed words and groups of letters",
    )
    image_revision: str | None = option(None, "branch, tag or commit of a repository; null = main")
    text_revision: str | None = option(None, "as image_revision")
    lock: SideName | None = option(None, "the pretrained side that stays as it is, part of no checkpoint", source="arXiv:2111.07991")
    channels: tuple[PositiveInt, ...] = option((16, 32, 64), "of a scratch image tower's levels; each after the first halves the grid")
    norm_groups: PositiveInt = option(8, "groups of a scratch image tower's normalisation; divides every level's channels")
    buckets: PositiveInt = option(4096, "numbers that words and groups of letters are hashed to, for a scratch text tower")
    initial_scale: Annotated[float, Field(le=math.log(100))] = option(
        INITIAL_SCALE,
        "t', logarithm of the inverse temperature; the loss clips it at ln 100, where it no longer learns",
        source="arXiv:2303.15343, section 3.2",
    )
    initial_bias: float = option(
        -10.0, "of the logits; for a batch of N pairs -log(N - 1) are the odds of a match", source="arXiv:2303.15343, section 3.2"
    )
    rows_at_once: NonNegativeInt = option(
        0, "pairs whose activations are held at once, the rest being computed again in the backward pass (arXiv:2101.06983); 0 = all"
    )

    def __post_init__(self) -> None:
        for key in ("image", "text"):
            place = getattr(self, key)
            if place is not None and place != MINILM and FilePath(place).is_dir():
                setattr(self, key, str(FilePath(place).absolute()))
                try:
                    _ = Side(getattr(self, key), None, f"{key}s").config
                except ValueError as error:
                    raise ConfigError(str(error), key=key) from error
        if self.image == MINILM:
            raise ConfigError("minilm reads texts, not images", key="image")
        if self.lock is not None:
            side = self.pretrained(self.lock)
            if side is None:
                raise ConfigError(f"a tower from scratch cannot be locked; name its weights: model.{self.lock}", key="lock")
            if self.width not in (None, side.width):
                raise ConfigError(f"the locked tower's embeddings have {side.width} entries, not {self.width}; set it to null", key="width")

    def pretrained(self, side: SideName) -> Side | None:
        """None where it is from scratch."""
        place = self.image if side == "image" else self.text
        revision = self.image_revision if side == "image" else self.text_revision
        return None if place is None else Side(place, revision, f"{side}s")

    @property
    def entries(self) -> int:
        """Of an embedding."""
        sides = [self.pretrained(side) for side in ((self.lock,) if self.lock else ("image", "text"))]
        return self.width or next((side.width for side in sides if side is not None), 128)

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """A `TwoTowers`. Raises ValueError when shape is not (C, H, W), channels do not fit or a pretrained side cannot be read."""
        if len(shape) != 3:
            raise ValueError(f"the towers are for images (C, H, W), got samples of shape {shape}")
        image = self._projected("image") or self._image_from_scratch(shape)
        text = nn.Identity() if self.lock == "text" else self._projected("text") or TextTower(self.buckets, self.entries)
        return TwoTowers(image, text, self.initial_scale, self.initial_bias, self.rows_at_once)

    def _image_from_scratch(self, shape: tuple[int, ...]) -> nn.Module:
        if wrong := [width for width in self.channels if width % self.norm_groups]:
            raise ValueError(f"channels {wrong[0]} is not divisible by norm_groups {self.norm_groups}; change one of them")
        if not self.channels or min(shape[1:]) < 2 ** len(self.channels):
            raise ValueError(f"images of {shape[1]}x{shape[2]} pixels do not fit {len(self.channels)} levels of channels")
        return Classifier(shape[0], self.entries, self.channels, self.norm_groups)

    def _projected(self, which: SideName) -> nn.Module | None:
        side = self.pretrained(which)
        if side is None:
            return None
        tower: nn.Module = side.tower()
        if self.lock == which:
            return Locked(tower)
        for p in tower.parameters():
            p.decays = False  # type: ignore[attr-defined]
        return tower if side.width == self.entries else nn.Sequential(tower, nn.Linear(side.width, self.entries, bias=False))

    def codec(self, data: Data) -> Codec:
        return CaptionCodec(self, data)

    def read(self, texts: list[str], device: torch.device | str = "cpu") -> Tensor:
        """What the text tower of `build` takes for each text: tokens [texts, L] int64, or embeddings [texts, D] where it is locked."""
        side = self.pretrained("text")
        if side is None:
            rows = [torch.tensor(pieces(text, self.buckets), dtype=torch.int64) for text in texts]
            longest = max(1, *(len(row) for row in rows))
            return torch.stack([pad(row, (0, longest - len(row))) for row in rows]).to(device)
        if self.lock == "text":
            return _embedded(side, tuple(texts), torch.device(device))
        return side.tokens(texts).to(device)


@cache
def _locked(side: Side) -> nn.Module:
    with torch.device("cpu"):
        return side.tower().eval().requires_grad_(False)


@lru_cache(maxsize=2)  # training and what judges it read the same texts
@torch.no_grad()
def _embedded(side: Side, texts: tuple[str, ...], device: torch.device) -> Tensor:
    tower, tokens = _locked(side).to(device), side.tokens(list(texts)).to(device)
    return torch.cat([tower(part) for part in tokens.split(_TEXTS_AT_ONCE)])


class Locked(nn.Module):
    """A network whose weights never learn, and so are no part of what is trained, averaged or saved. Gradients reach its input."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self._network = (network.eval().requires_grad_(False),)  # in a tuple, where a module does not find it

    @property
    def network(self) -> nn.Module:
        return self._network[0]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.network.to(x.device)(x)
        return output


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
    """forward: x [B, C, H, W] in [-1, 1], tokens as `Towers.read` gives them -> [B, 2 D + 2], see `unpack`.

    Args:
        initial_scale, initial_bias, rows_at_once: see `Towers`. The loss sees the batch whole, so that it may have more pairs than fit.
    """

    def __init__(self, image: nn.Module, text: nn.Module, initial_scale: float, initial_bias: float, rows_at_once: int):
        super().__init__()
        self.image, self.text, self.rows_at_once = image, text, rows_at_once
        self.logit_scale = nn.Parameter(torch.tensor([initial_scale]))
        self.logit_bias = nn.Parameter(torch.tensor([initial_bias]))
        for p in self.parameters():
            if p.ndim < 2:  # biases, normalisation, temperature
                p.decays = False  # type: ignore[attr-defined]

    def _embed(self, x: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat([self.image(x).float(), self.text(tokens).float()], 1)

    def _parts(self, x: Tensor, tokens: Tensor) -> Iterator[Tensor]:
        for part in zip(x.split(self.rows_at_once), tokens.split(self.rows_at_once), strict=True):
            yield checkpoint(self._embed, *part, use_reentrant=False)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        cached = 0 < self.rows_at_once < len(x) and torch.is_grad_enabled()
        both = torch.cat(list(self._parts(x, tokens))) if cached else self._embed(x, tokens)
        scalars = torch.cat([self.logit_scale, self.logit_bias])
        return torch.cat([both, scalars.float().expand(len(x), 2)], 1)
