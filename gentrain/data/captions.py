"""Texts that come with images, in files that anybody may have written."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

MOST = 2**16  # bytes of a caption


class Captions:
    """The texts of a data set's items.

    Args:
        texts: of each item, in order.
    """

    def __init__(self, texts: Sequence[str]):
        self._texts = texts

    @cached_property
    def all(self) -> list[str]:
        """Each text once, sorted."""
        return sorted(set(self._texts))

    @cached_property
    def places(self) -> Tensor:
        """[N] int64: the place in `all` of each item's text."""
        place = {text: number for number, text in enumerate(self.all)}
        return torch.tensor([place[text] for text in self._texts])


def caption_of(data: bytes) -> str:
    """The caption in a text file of at most `MOST` bytes, as one line. Raises ValueError for what is no text."""
    return one_line(data.decode("utf-8-sig", "strict"))


def caption_in(data: bytes | str, field: str) -> str | None:
    """The caption in a JSON object; None where it has no such field. Raises ValueError for what is no object with text."""
    try:
        content = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("no object")
    if field not in content:
        return None
    return caption_from(content[field], field)


def caption_from(text: Any, field: str) -> str:
    """The caption in a field, or a column, as one line. Raises ValueError for what is no text."""
    if not isinstance(text, str):
        raise ValueError(f"{field!r} is no text")
    if len(text) > MOST:
        raise ValueError(f"a caption of more than {MOST:,} characters")
    return one_line(text)


def one_line(text: str) -> str:
    """The text with single blanks. Raises ValueError where it holds commands for terminals, or halves of characters."""
    line = " ".join(text.split())
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in line):
        raise ValueError("holds characters that cannot be printed")
    return line
