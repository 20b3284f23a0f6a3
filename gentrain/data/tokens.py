"""Tokens: samples that are sequences of whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import TypedDict

from gentrain.config import option, register
from gentrain.data.base import Data, TensorItems, check_split
from gentrain.data.latents import Written, file_digest
from gentrain.data.toys import Toy
from gentrain.noise import Noise

FILES = {"train": "train.safetensors", "held_out": "held_out.safetensors"}
TOKENIZER = "tokenizer"  # the directory of what made the tokens, and decodes them


class Manifest(TypedDict):
    """What the stage `tokenize` has written. `image`: (C, H, W) of what tokens stand for. `files`: path -> SHA-256."""

    vocabulary: PositiveInt
    scales: list[PositiveInt]
    length: PositiveInt
    image: list[PositiveInt]
    class_names: list[str]
    licence: str
    files: dict[str, str]


class TokenData(Data):
    """Samples x [T] int64 in [0, vocabulary). What learns them is a `TokenModel`."""

    @property
    def vocabulary(self) -> int:
        """Number of values that a token has."""
        raise NotImplementedError

    @property
    def scales(self) -> Sequence[int]:
        """Sides of the square grids that the tokens fill one after the other; empty for tokens of one sequence."""
        return ()

    @property
    def tokenizer(self) -> Path | None:
        """Where what made images to tokens is kept, to decode them; None for tokens that are the data themselves."""
        return None

    @property
    def decoded(self) -> tuple[int, ...]:
        """Shape of what a sample is decoded to: (C, H, W) of images."""
        return self.shape


@register("tokens")
@dataclass
class Tokens(Written[Manifest], TokenData):
    """What a stage `tokenize` has made of a data set: its splits, tokens in place of images. Samples of a run on it are decoded."""

    directory: str = option(help="of the stage `tokenize`")
    digest: str | None = option(None, "of what it wrote, which a run records: tokens that are made anew are refused")

    schema: ClassVar[TypeAdapter[Any]] = TypeAdapter(Manifest)
    stage: ClassVar[str] = "tokenize"
    things: ClassVar[str] = "tokens"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.manifest["length"],)

    @property
    def vocabulary(self) -> int:
        return self.manifest["vocabulary"]

    @property
    def scales(self) -> Sequence[int]:
        return self.manifest["scales"]

    @property
    def tokenizer(self) -> Path:
        return Path(self.directory) / TOKENIZER

    @property
    def decoded(self) -> tuple[int, ...]:
        return tuple(self.manifest["image"])

    def split(self, name: str) -> TensorItems:
        check_split(name)
        path = Path(self.directory) / FILES[name]
        try:
            found, digest = load_file(path), file_digest(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is missing or damaged ({type(error).__name__}); run the stage `tokenize` again") from error
        if digest != self.manifest["files"][FILES[name]]:
            raise ValueError(f"{path} is not the file that was written; run the stage `tokenize` again")
        return TensorItems(found["x"], found["label"])


@register("walks")
@dataclass
class Walks(Toy, TokenData):
    """Walks on a ring of `places`: the first place is uniform, each step goes label + 1 places on or back. A toy whose law is known."""

    places: PositiveInt = option(16, "of the ring, more than twice the classes; values of a token")
    length: PositiveInt = option(16, "tokens of a walk")
    strides: PositiveInt = option(2, "classes: those of label k go k + 1 places at a step")

    def __post_init__(self) -> None:
        if self.places <= 2 * self.strides:
            raise ValueError(f"steps of {self.strides} places on a ring of {self.places} are not all different; raise places")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def vocabulary(self) -> int:
        return self.places

    def class_count(self) -> int:
        return self.strides

    def draw(self, label: Tensor, noise: Noise) -> Tensor:
        """Walks of the given classes: label [B] int64 -> x [B, length] int64."""
        first = noise.randint(0, self.places, (len(label), 1))
        steps = (2 * noise.randint(0, 2, (len(label), self.length - 1)) - 1) * (label + 1)[:, None]
        return torch.cat([first, steps], 1).cumsum(1) % self.places
