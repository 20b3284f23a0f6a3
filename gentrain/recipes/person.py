"""A person who says in the terminal which images are better."""

from __future__ import annotations

import sys

import torch
from rich.color import Color
from rich.columns import Columns
from rich.console import Console, Group
from rich.style import Style
from rich.text import Text
from torch import Tensor
from torch.nn.functional import interpolate

from gentrain.config import ConfigError

_WIDEST = 32  # characters of an image: larger ones are shrunk
_SHOWN = 4  # images of a candidate


class Person:
    """An oracle of `methods.zo_rank` in the terminal: shows candidates, two pixels to a character, and asks which are best, in order.

    Raises ConfigError where there is no terminal, also once its input has ended.
    """

    def __init__(self) -> None:
        if not sys.stdin.isatty():
            raise ConfigError("a person answers in a terminal, and the input is none; start it in one, or name a reward", key="reward")
        self.console = Console()

    def __call__(self, images: Tensor, named: int) -> Tensor:
        """images [m, rows, n, C, H, W] in [-1, 1]: n of each candidate -> [m, rows]: m for the best, 0 for those that are not named."""
        values = torch.zeros(images.shape[:2])
        for row in range(images.shape[1]):
            self.console.print(Columns([Group(Text(str(i + 1)), picture(each[:_SHOWN])) for i, each in enumerate(images[:, row])]))
            for place, chosen in enumerate(self._ask(len(images), named)):
                values[chosen, row] = len(images) - place
        return values

    def _ask(self, count: int, named: int) -> list[int]:
        what = "the best" if named == 1 else f"the best {named}, best first, with blanks between"
        while True:
            try:
                words = self.console.input(f"Which of 1 to {count}: {what}? ").split()
            except EOFError as error:
                raise ConfigError("the terminal's input has ended; start again to be asked anew", key="reward") from error
            chosen = [int(word) - 1 for word in words if word.isascii() and word.isdigit()]
            if len(chosen) == len(words) == named == len(set(chosen)) and all(0 <= each < count for each in chosen):
                return chosen
            self.console.print(f"Expected {named} different {'number' if named == 1 else 'numbers'} from 1 to {count}.")


def picture(images: Tensor) -> Text:
    """[n, C, H, W] in [-1, 1], C = 1 or 3, beside each other; two rows of pixels to a line."""
    if images.shape[-1] > _WIDEST:
        images = interpolate(images, scale_factor=_WIDEST / images.shape[-1], mode="area")
    sheet = torch.cat(list(images), 2)
    pixels = ((sheet[:, : len(sheet[0]) // 2 * 2].clamp(-1, 1) + 1) * 127.5).round().int().expand(3, -1, -1)
    text = Text()
    for top, bottom in zip(pixels[:, 0::2].permute(1, 2, 0).tolist(), pixels[:, 1::2].permute(1, 2, 0).tolist(), strict=True):
        for upper, lower in zip(top, bottom, strict=True):
            text.append("▀", Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower)))
        text.append("\n")
    return text
