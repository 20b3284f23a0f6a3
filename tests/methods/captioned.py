"""A data set whose pictures can be told by their captions: coloured squares in a corner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from gentrain.config import register
from gentrain.data.base import CaptionedItems, Data, check_split

_COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}
_ROWS, _COLUMNS = {"upper": 0, "middle": 1, "lower": 2}, {"left": 0, "central": 1, "right": 2}
_HELD_OUT = 5  # every fifth


@register("captioned_patches")
@dataclass
class CaptionedPatches(Data):
    """36 pictures of 6 x 6 pixels, such as "red upper left"."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, 6, 6)

    @property
    def class_names(self) -> Sequence[str]:
        return ()

    @property
    def captions(self) -> Sequence[str]:
        return [" ".join(words) for words in product(_COLOURS, _ROWS, _COLUMNS)]

    @property
    def licence(self) -> str:
        return "made up"

    def split(self, name: str) -> CaptionedItems:
        check_split(name)
        places = torch.arange(len(self.captions))
        caption = places[(places % _HELD_OUT == 0) == (name == "held_out")]
        x = torch.full((len(caption), *self.shape), -1.0)
        for picture, words in zip(x, (self.captions[place].split() for place in caption.tolist()), strict=True):
            top, left = 2 * _ROWS[words[1]], 2 * _COLUMNS[words[2]]
            picture[:, top : top + 2, left : left + 2] = torch.tensor(_COLOURS[words[0]], dtype=torch.float32)[:, None, None]
        return CaptionedItems(x, torch.full((len(x),), -1), caption)
