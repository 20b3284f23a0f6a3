"""How legible a text is: the formula, with a reader that is told what it reads, and with the package where it is installed."""

import importlib.util
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from gentrain.data.digits import MNIST5k
from gentrain.rewards import ocr
from gentrain.rewards.base import Texts
from gentrain.rewards.ocr import Legible, edit_distance


@pytest.mark.parametrize(
    "a, b, expected", [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("ab", "ba", 2), ("flaw", "lawn", 2)]
)
def test_the_distance_is_levenshteins(a: str, b: str, expected: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == expected


def test_a_missing_package_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install rapidocr-onnxruntime"):
        Legible().check_data(MNIST5k())


class Captions:
    captions = ('a sign that says "Open late" and "now"', "Ada", "  ")
    class_names: tuple[str, ...] = ()
    registered_name = "captions"


def legible() -> Legible:
    reward = Legible(side=64)
    reward.texts = Texts(Captions())  # type: ignore[arg-type]
    return reward


def test_the_score_is_the_share_that_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what stands in quotes, without blanks and case; the reader sees images of at least `side` pixels."""
    answers: list[Any] = [[(None, "OPEN ", 0.9), (None, "lateNo", 0.8)], [(None, "abacadabra", 0.9)], None, [(None, "x", 0.9)]]
    sizes = []

    def read(image: Any) -> tuple[Any, None]:
        sizes.append(image.shape)
        return answers.pop(0), None

    monkeypatch.setattr(ocr, "_reader", lambda: read)
    images = torch.zeros(4, 1, 24, 30)
    scores = legible()(images, {"caption": torch.tensor([0, 1, 1, 2])}, {})
    assert scores.tolist() == pytest.approx([1 - 1 / 11, 0, 0, 0])
    assert sizes == [(72, 90, 3)] * 3  # nothing is read for who asked for no text
    assert not scores.requires_grad


def test_the_package_reads_what_is_written() -> None:
    pytest.importorskip("rapidocr_onnxruntime")
    sheets = []
    for text in ("Open late now", "Ada", ""):
        sheet = Image.new("RGB", (256, 64), "white")
        ImageDraw.Draw(sheet).text((12, 12), text, fill="black", font=ImageFont.load_default(32))
        sheets.append(torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).reshape(64, 256, 3).permute(2, 0, 1) / 127.5 - 1)
    scores = legible()(torch.stack(sheets), {"caption": torch.tensor([0, 1, 1])}, {})
    assert scores[0] >= 0.9 and scores[1] == 1 and scores[2] == 0
