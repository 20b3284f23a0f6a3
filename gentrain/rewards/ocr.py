"""How well the text that an image was to show can be read from it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from gentrain.config import option, register
from gentrain.data.base import Data, import_for
from gentrain.rewards.base import Asked, Texts, check_images
from gentrain.rewards.black_box import BlackBox, pictures

_PACKAGE, _REMEDY = "rapidocr_onnxruntime", "pip install rapidocr-onnxruntime"
_QUOTED = re.compile(r"[\"“](.+?)[\"”]")


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest characters to insert, delete or replace that make b of a."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


@register("legible")
@dataclass
class Legible(BlackBox):
    """1 less the edit distance between what RapidOCR reads and the text asked for, in lengths of that, at least 0 (as in
    arXiv:2505.05470, the reward of its text rendering).

    The text is what the caption, or the class' name, has in double quotes, or all of it. Case and blanks do not count. Rows that were
    asked for no text score 0.
    """

    range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    licence: ClassVar[str] = "Apache-2.0 (rapidocr-onnxruntime and the weights of PaddleOCR that it carries)"
    needs: ClassVar[str] = f"the package rapidocr-onnxruntime ({_REMEDY}), which carries the weights, and captions or classes"

    side: PositiveInt = option(256, "images whose shorter side is less are enlarged to this", unit="pixels")

    def check_data(self, data: Data) -> None:
        check_images(data)
        self.texts = Texts(data)
        import_for("the reward legible", _PACKAGE, _REMEDY)

    def score(self, images: Tensor, asked: Asked) -> Tensor:
        texts, rows = self.texts(asked)
        wanted = [_letters(" ".join(_QUOTED.findall(text)) or text) for text in texts]
        scores = []
        for picture, row in zip(pictures(images), rows.tolist(), strict=True):
            text = wanted[row]
            scores.append(max(0.0, 1 - edit_distance(self._read(picture), text) / len(text)) if text else 0.0)
        return torch.tensor(scores)

    def _read(self, picture: Any) -> str:
        factor = max(1, -(-self.side // min(picture.size)))
        large = picture.convert("RGB").resize([length * factor for length in picture.size])
        found, _ = _reader()(np.asarray(large)[:, :, ::-1])  # as OpenCV has them, blue first
        return _letters("".join(text for _, text, _ in found or []))


def _letters(text: str) -> str:
    return "".join(text.split()).casefold()


@cache
def _reader() -> Any:
    return import_for("the reward legible", _PACKAGE, _REMEDY).RapidOCR()
