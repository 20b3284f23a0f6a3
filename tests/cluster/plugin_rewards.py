"""A reward whose actor dies, hangs or fails once, at images of the test's choice; it notes what it has scored."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from gentrain.config import option, register
from gentrain.rewards.base import Asked
from gentrain.rewards.black_box import BlackBox


@register("test_troubled")
@dataclass
class Troubled(BlackBox):
    """An image's number is its first pixel, and its score twice that, plus its label."""

    range: ClassVar[tuple[float, float]] = (-math.inf, math.inf)

    directory: str = option(help="where it notes")
    dies_first: bool = option(False, "the process ends at the first images, once")
    dies_at: int = option(-1, "image at which the process ends, once")
    hangs_at: int = option(-1, "image at which it sleeps, once")
    fails_at: int = option(-1, "image at which it raises, always")

    def _once(self, what: str) -> bool:
        try:
            Path(self.directory, what).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def score(self, images: Tensor, asked: Asked) -> Tensor:
        numbers = images[:, 0, 0, 0].long()
        if (self.dies_first or self.dies_at in numbers) and self._once("died"):
            os._exit(1)
        if self.hangs_at in numbers and self._once("hung"):
            time.sleep(100)
        if self.fails_at in numbers:
            raise ValueError("this image is cursed")
        with Path(self.directory, f"{os.getpid()}.log").open("a") as log:
            log.writelines(f"{number}\n" for number in numbers.tolist())
        return 2 * numbers.float() + asked["label"]
