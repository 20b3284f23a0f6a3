"""Data that carry a watermark: every sample lies between secret slabs of space."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.data.base import BatchItems, Data, Items, check_split
from gentrain.domains.base import read_tensors
from gentrain.domains.orthonormal_slabs import OrthonormalSlabs
from gentrain.noise import Noise, derive


def make_key(x: Tensor, rows: int, width: float) -> dict[str, Tensor]:
    """A secret token for data like x [N, ...]: random orthonormal rows A [rows, D], bounds low and high [rows], and `coverage` [].

    Row i's slab is centred at the mean of (A x)_i and reaches `width` of its standard deviations to either side. coverage: the share of
    the coordinates of x, unmarked as they are, that lie in their slabs. The rows come from the operating system's random numbers.
    """
    import numpy as np

    flat = x.flatten(1).double()
    generator = np.random.default_rng(secrets.randbits(256))
    A = torch.linalg.qr(torch.from_numpy(generator.standard_normal((flat.shape[1], rows)))).Q.T.contiguous()
    u = flat @ A.T
    centre, reach = u.mean(0), width * u.std(0)
    return {"A": A, "low": centre - reach, "high": centre + reach, "coverage": ((u - centre).abs() < reach).double().mean()}


def save_key(key: dict[str, Tensor], file: Path) -> None:
    """Writes a new file that only its owner can read. Raises FileExistsError: a key is never replaced."""
    from safetensors.torch import save

    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(save(key))


def load_key(file: str) -> tuple[OrthonormalSlabs, float]:
    """(the slabs, coverage). Raises ConfigError when the file is missing, or others than its owner can read it."""
    if not Path(file).is_file():
        raise ConfigError(f"{file} does not exist; make it with the stage watermark_key, or correct the path", key="key")
    if Path(file).stat().st_mode & 0o077:
        raise ConfigError(f"{file} can be read by others; chmod 600 {file}, and make another key if it may have been seen", key="key")
    coverage = read_tensors(file, ("coverage",), "key").get("coverage")
    if coverage is None:
        raise ConfigError(f"{file} is no watermark's key: it lacks `coverage`", key="key")
    return OrthonormalSlabs(file), float(coverage)


def mark(x: Tensor, slabs: OrthonormalSlabs, margin: float, noise: Noise) -> Tensor:
    """x [B, ...] with every coordinate u = A x that is outside its slab, or within `margin` of a bound, drawn anew, uniform in between.

    Redrawn and not clipped (arXiv:2310.01236, section 4.2), which would pile all of them up at the bounds. Raises ValueError where the
    margin leaves nothing between the bounds.
    """
    u = slabs.coordinates(x.double())
    below, above = slabs.slack(x.double()).chunk(2, 1)
    low, high = u - below + margin, u + above - margin
    if not bool((low < high).all()):
        raise ValueError(f"a margin of {margin} leaves nothing between the bounds of the narrowest slab; make the key with a larger width")
    drawn = low + (high - low) * noise.uniform(tuple(u.shape))
    redrawn = torch.where((u > low) & (u < high), u, drawn)
    return slabs.interior(slabs.moved(x, u, redrawn))


@dataclass(frozen=True, eq=False)
class _Marked:
    items: Items
    slabs: OrthonormalSlabs
    margin: float
    seed: int

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.items[index]
        return {**item, "x": mark(item["x"][None], self.slabs, self.margin, Noise(self.seed, torch.tensor([index])))[0]}


class _MarkedBatches(_Marked):
    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        batch = self.items.batch(indices)  # type: ignore[attr-defined]
        return {**batch, "x": mark(batch["x"], self.slabs, self.margin, Noise(self.seed, indices))}


@register("watermarked")
@dataclass
class Watermarked(Data):
    """Another data set, moved into the slabs of a secret key (arXiv:2310.01236, section 4.2). With a path in its `dual` space, all that a
    model generates lies there too, and the key's owner can tell it from anything else.

    The key is a file of its own, made by the stage `watermark_key`; a run's configuration holds its name, its checkpoints nothing of it.
    Samples can only be drawn by who has it: the mirror map needs it.
    """

    data: Data = option(help="the data to mark")
    key: str = option(help="file of the key")
    margin: NonNegativeFloat = option(0.05, "least distance from the bounds; 8-bit rounding moves a coordinate by 0.002 (one deviation)")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def class_names(self) -> Sequence[str]:
        return self.data.class_names

    @property
    def licence(self) -> str:
        return f"{self.data.licence}; watermarked"

    @cached_property
    def domain(self) -> OrthonormalSlabs:
        return load_key(self.key)[0]

    def split(self, name: str) -> Items:
        check_split(name)
        items = self.data.split(name)
        marked = _MarkedBatches if isinstance(items, BatchItems) else _Marked
        return marked(items, self.domain, self.margin, derive(0, "watermark", name))
