"""The Inception v3 whose features FID and KID are of, as the weights file of pytorch-fid names its parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, relu

SIDE = 299  # pixels it is shown


class Convolution(nn.Module):
    """Without a bias, then normalised, then rectified. `size`: one side, or (height, width); padded to keep a stride of 1 its size."""

    def __init__(self, entries: int, out: int, size: int | tuple[int, int], stride: int = 1, padded: bool = True):
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        padding = (height // 2, width // 2) if padded else 0
        self.conv = nn.Conv2d(entries, out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn(self.conv(x)))


def mean_around(x: Tensor) -> Tensor:
    """Of 3 x 3 pixels, of those that exist."""
    return avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def largest_around(x: Tensor) -> Tensor:
    return max_pool2d(x, 3, 1, 1)


def halved(x: Tensor) -> Tensor:
    return max_pool2d(x, 3, 2)


class Branches(nn.Module):
    """Chains of parts beside each other, their channels one after the other; a tuple of parts forks. `pool` begins the last chain.

    A chain is one of names of parts; one of none is the pool alone.
    """

    def __init__(self, parts: dict[str, Convolution], chains: list[list[str | tuple[str, str]]], pool: object):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.chains, self.pool = chains, pool

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for chain in self.chains:
            y = self.pool(x) if chain is self.chains[-1] else x  # type: ignore[operator]
            for name in chain:
                names = (name,) if isinstance(name, str) else name
                y = torch.cat([self.get_submodule(each)(y) for each in names], 1)
            found.append(y)
        return torch.cat(found, 1)


def _fine(entries: int, pooled: int) -> Branches:
    parts = {
        "branch1x1": Convolution(entries, 64, 1),
        "branch5x5_1": Convolution(entries, 48, 1),
        "branch5x5_2": Convolution(48, 64, 5),
        "branch3x3dbl_1": Convolution(entries, 64, 1),
        "branch3x3dbl_2": Convolution(64, 96, 3),
        "branch3x3dbl_3": Convolution(96, 96, 3),
        "branch_pool": Convolution(entries, pooled, 1),
    }
    doubled: list[str | tuple[str, str]] = [f"branch3x3dbl_{i}" for i in (1, 2, 3)]
    return Branches(parts, [["branch1x1"], ["branch5x5_1", "branch5x5_2"], doubled, ["branch_pool"]], mean_around)


def _to_middle() -> Branches:
    parts = {
        "branch3x3": Convolution(288, 384, 3, 2, padded=False),
        "branch3x3dbl_1": Convolution(288, 64, 1),
        "branch3x3dbl_2": Convolution(64, 96, 3),
        "branch3x3dbl_3": Convolution(96, 96, 3, 2, padded=False),
    }
    return Branches(parts, [["branch3x3"], [f"branch3x3dbl_{i}" for i in (1, 2, 3)], []], halved)


def _middle(within: int) -> Branches:
    wide, high = (1, 7), (7, 1)
    parts = {
        "branch1x1": Convolution(768, 192, 1),
        "branch7x7_1": Convolution(768, within, 1),
        "branch7x7_2": Convolution(within, within, wide),
        "branch7x7_3": Convolution(within, 192, high),
        "branch7x7dbl_1": Convolution(768, within, 1),
        "branch7x7dbl_2": Convolution(within, within, high),
        "branch7x7dbl_3": Convolution(within, within, wide),
        "branch7x7dbl_4": Convolution(within, within, high),
        "branch7x7dbl_5": Convolution(within, 192, wide),
        "branch_pool": Convolution(768, 192, 1),
    }
    once, twice = ([f"branch7x7{kind}_{i}" for i in range(1, last)] for kind, last in (("", 4), ("dbl", 6)))
    return Branches(parts, [["branch1x1"], [*once], [*twice], ["branch_pool"]], mean_around)


def _to_coarse() -> Branches:
    parts = {
        "branch3x3_1": Convolution(768, 192, 1),
        "branch3x3_2": Convolution(192, 320, 3, 2, padded=False),
        "branch7x7x3_1": Convolution(768, 192, 1),
        "branch7x7x3_2": Convolution(192, 192, (1, 7)),
        "branch7x7x3_3": Convolution(192, 192, (7, 1)),
        "branch7x7x3_4": Convolution(192, 192, 3, 2, padded=False),
    }
    return Branches(parts, [["branch3x3_1", "branch3x3_2"], [f"branch7x7x3_{i}" for i in (1, 2, 3, 4)], []], halved)


def _coarse(entries: int, pool: object) -> Branches:
    parts = {
        "branch1x1": Convolution(entries, 320, 1),
        "branch3x3_1": Convolution(entries, 384, 1),
        "branch3x3_2a": Convolution(384, 384, (1, 3)),
        "branch3x3_2b": Convolution(384, 384, (3, 1)),
        "branch3x3dbl_1": Convolution(entries, 448, 1),
        "branch3x3dbl_2": Convolution(448, 384, 3),
        "branch3x3dbl_3a": Convolution(384, 384, (1, 3)),
        "branch3x3dbl_3b": Convolution(384, 384, (3, 1)),
        "branch_pool": Convolution(entries, 192, 1),
    }
    once: list[str | tuple[str, str]] = ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")]
    twice: list[str | tuple[str, str]] = ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")]
    return Branches(parts, [["branch1x1"], once, twice, ["branch_pool"]], pool)


class Inception(nn.Module):
    """Inception v3 (arXiv:1512.00567) without its head, as the TensorFlow graph of 2015 that FID was defined with computes it.

    That one takes the mean of the pixels that exist at the borders, and in its last block the largest in place of the mean.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2, padded=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _fine(192, 32), _fine(256, 64), _fine(288, 64)
        self.Mixed_6a = _to_middle()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_middle(within) for within in (128, 160, 160, 192))
        self.Mixed_7a = _to_coarse()
        self.Mixed_7b, self.Mixed_7c = _coarse(1280, mean_around), _coarse(2048, largest_around)

    def features(self, x: Tensor) -> Tensor:
        """Images [B, 1 or 3, H, W] in [-1, 1], taken at 256 levels and enlarged or reduced to 299 pixels, bilinear -> [B, 2048]."""
        x = ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        x = interpolate(x.expand(-1, 3, -1, -1), (SIDE, SIDE), mode="bilinear", align_corners=False)
        x = halved(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = halved(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        for name, block in self.named_children():
            x = block(x) if name.startswith("Mixed") else x
        return x.mean((2, 3))
