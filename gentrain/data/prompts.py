"""Prompts without images, for methods that learn from what their teacher draws."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from gentrain.config import option, register
from gentrain.data.base import Data, check_split
from gentrain.data.captions import one_line


@register("prompts")
@dataclass
class Prompts(Data):
    """One prompt per line of a text file, or per object of a .jsonl file. Both splits hold all of them; images are blank."""

    path: str = option(help="a .txt file, one prompt per line, or a .jsonl file of objects")
    field: str = option("text", "of the objects that holds the prompt (.jsonl)")
    size: PositiveInt = option(64, "height and width of the images to learn to draw", unit="pixels")
    colours: Literal["rgb", "grey"] = option("rgb", "3 channels or 1")
    licence: str = option("not stated", "origin and licence of the prompts, for the model card")

    @property
    def shape(self) -> tuple[int, ...]:
        return (3 if self.colours == "rgb" else 1, self.size, self.size)

    @property
    def class_names(self) -> Sequence[str]:
        return ()

    @property
    def blank(self) -> bool:
        return True

    @cached_property
    def captions(self) -> Sequence[str]:
        """Raises ValueError when there are none, or the file cannot be read."""
        try:
            lines = Path(self.path).expanduser().read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the prompts in {self.path} cannot be read ({error}); name a text file in UTF-8") from error
        read = self._object if self.path.lower().endswith(".jsonl") else lambda line: line
        prompts: dict[str, None] = {}
        for number, line in enumerate(lines, 1):
            try:
                prompts[one_line(read(line))] = None
            except ValueError as error:
                raise ValueError(f"line {number} of {self.path} {error}; mend it") from error
        prompts.pop("", None)
        if not prompts:
            raise ValueError(f"there is no prompt in {self.path}; put one on each line")
        return list(prompts)

    def _object(self, line: str) -> str:
        if not line.strip():
            return ""
        try:
            text = json.loads(line)[self.field]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"is no object with {self.field!r} ({type(error).__name__})") from error
        if not isinstance(text, str):
            raise ValueError(f"holds a {self.field!r} that is no text")
        return text

    def fit(self) -> None:
        self.path = str(Path(self.path).expanduser().absolute())
        _ = self.captions

    def split(self, name: str) -> PromptItems:
        check_split(name)
        return PromptItems(len(self.captions), self.shape)


@dataclass(frozen=True)
class PromptItems:
    """A blank image [C, H, W] for each of `count` prompts."""

    count: int
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.batch(torch.tensor([index])).items()}

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        return {"x": torch.zeros(len(indices), *self.shape), "caption": indices.clone()}
