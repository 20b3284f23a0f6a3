"""Data that carry a watermark: every sample lies between secret slabs of space."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from gentrain.config import ConfigError, errors_about, option, register
from gentrain.data.base import BatchItems, Data, Items, check_split, refuse_buckets
from gentrain.domains.orthonormal_slabs import OrthonormalSlabs
from gentrain.noise import Noise, derive

_PROBED = 64  # items that are marked at once, to see whether the key suits them


def make_key(x: Tensor, rows: int, width: float) -> dict[str, Tensor]:
    """A secret token for data like x [N, ...]: random orthonormal rows A [rows, D], bounds low and high [rows].

    Row i's slab begins at the mean of (A x)_i and reaches `width` of its standard deviations to one side, which a fair coin chooses: a
    sample made without the key is inside with probability 1/2 at most, whatever it shows (`metrics.watermark`). Rows and coins come from
    the operating system's random numbers. Raises ConfigError for more rows than a sample has elements.
    """
    import numpy as np

    flat = x.flatten(1).double()
    if rows > flat.shape[1]:
        raise ConfigError(f"{rows} rows cannot be orthonormal in the {flat.shape[1]} elements of a sample; take fewer", key="rows")
    generator = np.random.default_rng(secrets.randbits(256))
    A = torch.linalg.qr(torch.from_numpy(generator.standard_normal((flat.shape[1], rows)))).Q.T.contiguous()
    u = flat @ A.T
    centre, reach = u.mean(0), width * u.std(0)
    above = torch.from_numpy(generator.integers(0, 2, rows)).bool()
    return {"A": A, "low": centre.where(above, centre - reach), "high": (centre + reach).where(above, centre)}


def save_key(key: dict[str, Tensor], file: Path) -> None:
    """Writes a new file that only its owner can read. Raises FileExistsError: a key is never replaced."""
    from safetensors.torch import save

    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(save(key))


def load_key(file: str, levels: int | None = None) -> OrthonormalSlabs:
    """The slabs, for images of `levels`. Raises ConfigError when the file is missing or no key, or others than its owner can read it."""
    if not Path(file).is_file():
        raise ConfigError(f"{file} does not exist; make it with the stage watermark_key, or correct the path", key="key")
    if Path(file).stat().st_mode & 0o077:
        raise ConfigError(f"{file} can be read by others; chmod 600 {file}, and make another key if it may have been seen", key="key")
    try:
        return OrthonormalSlabs(file, levels=levels)
    except (ConfigError, ValueError) as error:  # whose own keys are those of a domain
        raise ConfigError(f"{file} is no key: {getattr(error, 'message', error)}; take that of watermark_key", key="key") from error


def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def mark(x: Tensor, slabs: OrthonormalSlabs, margin: float, noise: Noise) -> Tensor:
    """x [B, ...] with every coordinate u = A x that is outside its slab, or within `margin` of a bound, drawn anew.

    Redrawn and not clipped (arXiv:2310.01236, section 4.2), which would pile all of them up at the bounds: uniform in the nearer half of
    the slab, which moves the sample less than the whole slab would. Raises ValueError where the margin leaves nothing between the bounds.
    """
    u = slabs.coordinates(x.double())
    below, above = slabs.slack(x.double()).chunk(2, 1)
    low, high = u - below + margin, u + above - margin
    if not bool((low < high).all()):
        raise ValueError(f"a margin of {margin} leaves nothing between the bounds of the narrowest slab; make the key with a larger width")
    first = torch.where(u < (low + high) / 2, low, (low + high) / 2)
    drawn = first + (high - low) / 2 * noise.uniform(tuple(u.shape))
    redrawn = torch.where((u > low) & (u < high), u, drawn)
    return slabs.interior(slabs.moved(x, u, redrawn), margin)


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
    digest: str | None = option(None, "SHA-256 of the key's file, by which another key is told; null = taken from the file")
    levels: Annotated[int, Field(ge=2)] | None = option(256, "of images in [-1, 1] as saved, which the mark outlasts; null = no images")

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
        slabs = self._load()
        if self.digest is not None and self.digest != _digest(self.key):
            raise ConfigError(
                f"{self.key} is another key than that of this run, whose samples it would spoil; put that back", key="data.key"
            )
        return slabs

    def _load(self) -> OrthonormalSlabs:
        with errors_about("data"):
            return load_key(self.key, self.levels)

    def fit(self) -> None:
        self.data.fit()
        self._load()
        self.digest = self.digest or _digest(self.key)

    def split(self, name: str) -> Items:
        check_split(name)
        items = self.data.split(name)
        refuse_buckets(items)
        kind = _MarkedBatches if isinstance(items, BatchItems) else _Marked
        marked = kind(items, self.domain, self.margin, derive(0, "watermark", name))
        if self.levels is not None:
            first = range(min(len(marked), _PROBED))
            if any(bool((items[index]["x"].abs() > 1).any()) for index in first):
                raise ConfigError(
                    "the samples reach beyond [-1, 1], where images are; set it to null for what is no images", key="data.levels"
                )
            if float(share := self.domain.survives(torch.stack([marked[index]["x"] for index in first])).double().mean()) < 0.99:
                raise ConfigError(f"only {share:.0%} of the first images fit between all slabs; make a key of fewer rows", key="data.key")
        return marked
