"""Random numbers that belong to samples, not to processes.

A row of noise is a function of (seed, position of the sample in the run, stream, call index, element), computed by a counter-based
generator in integer arithmetic. So a sample meets the same noise whatever the number of ranks, the micro-batch size or the device, and
a run resumed at a sample goes on with the noise it would have had.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer: splitmix64's increment
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): int64 in, int64 out, products wrap."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def derive(seed: int, *parts: int | str) -> int:
    """A seed in [0, 2^63) for a purpose named by `parts`: different purposes get unrelated streams."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Noise:
    """The random numbers of some samples of one update.

    Args:
        seed: of the run and the purpose (see `derive`).
        rows: [B] int64, position of each sample in the run (samples seen before it).
        device: where the numbers are made.

    Each call draws new numbers; the first dimension of every shape must be B.
    """

    def __init__(self, seed: int, rows: Tensor, device: torch.device | str = "cpu"):
        self.rows = rows.to(device=device, dtype=torch.int64)
        self._keys = _mix(self.rows * _GOLDEN + derive(seed, "rows"))
        self._calls = 0

    def __len__(self) -> int:
        return len(self.rows)

    def _bits(self, shape: tuple[int, ...], count: int | None = None) -> Tensor:
        """[B, count] random int64; count defaults to the number of elements in a row."""
        if not shape or shape[0] != len(self.rows):
            raise ValueError(f"the first dimension must be the {len(self.rows)} samples, got shape {tuple(shape)}")
        self._calls += 1
        count = math.prod(shape[1:]) if count is None else count
        keys = _mix(self._keys + torch.tensor(_GOLDEN) * self._calls)
        counters = torch.arange(1, count + 1, device=self.rows.device, dtype=torch.int64) * _GOLDEN
        return _mix(keys[:, None] + counters)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers, by Box and Muller: two from each 64-bit word."""
        size = math.prod(shape[1:])
        bits = self._bits(shape, (size + 1) // 2)
        work = dtype if dtype == torch.float64 else torch.float32
        radius = (-2 * (_shift(bits, 32).to(work) + 0.5).mul_(2**-32).log_()).sqrt_()
        angle = (bits & 0xFFFFFFFF).to(work).mul_(2 * math.pi * 2**-32)
        values = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :size]
        return values.reshape(shape).to(dtype)

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32 in [low, high): 24 random bits, so that 1 is never reached."""
        values = _shift(self._bits(shape), 40).reshape(shape).to(torch.float32) * ((high - low) * 2**-24) + low
        below = torch.nextafter(torch.tensor(high, dtype=torch.float32), torch.tensor(low, dtype=torch.float32))
        return values.clamp_(max=below.item())  # the sum may round up to `high`

    def randint(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        """int64 in [low, high). The bias is below (high - low) / 2^63."""
        return low + _shift(self._bits(shape), 1).reshape(shape) % (high - low)

    def bernoulli(self, probability: float, shape: tuple[int, ...]) -> Tensor:
        """bool, True with `probability`."""
        return self.uniform(shape) < probability
