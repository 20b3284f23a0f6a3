"""Reads a split in an order that is a function of (seed, samples seen): any number of ranks, micro-batches and workers reads the same."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from gentrain.data.base import BatchItems, BlockItems, CorruptItem, Items
from gentrain.noise import Noise, derive

log = logging.getLogger(__name__)

_BLOCK = 2**14  # positions put in order at once: a call of `order` costs some milliseconds, for one position or for thousands
_ROUNDS = 10  # with 8 the permutations of 6 items are still measurably uneven

Request = tuple[Tensor, Tensor]  # positions [m] and the items [m] that `order` puts there
Corrupt = dict[int, str]  # item -> what is wrong with it


def order(seed: int, count: int, positions: Tensor) -> Tensor:
    """The items at some positions of a run over `count` items: each epoch of `count` positions is a permutation of its own.

    positions [B] int64 >= 0 -> [B] int64 in [0, count). A Feistel network whose halves are digits to the base ceil(sqrt(count)), walked
    until it lands below `count` (Black and Rogaway 2002): no table, so that resuming and sets of any size cost nothing.
    """
    base = max(2, math.isqrt(count - 1) + 1)
    key = derive(seed, "order")
    epoch, item = positions // count, positions % count
    walking = torch.arange(len(positions))
    while len(walking):
        high, low = item[walking] // base, item[walking] % base
        for round in range(_ROUNDS):
            inputs = (epoch[walking] * _ROUNDS + round) * base + low  # no two rounds or epochs share one
            shift = Noise(key, inputs).randint(0, base, low.shape)
            high, low = low, (high + shift) % base
        item[walking] = high * base + low
        walking = walking[item[walking] >= count]
    return item


class BlockOrder:
    """`order` for items in blocks: each epoch is a permutation of the blocks, and in each stretch of `together` of them one of their items.

    A reader that keeps `together` blocks reads each block once or twice an epoch. Nothing but the blocks' sizes is held, so that
    resuming is as cheap as with `order`.
    """

    def __init__(self, seed: int, blocks: Tensor, together: int):
        self._seed, self._sizes, self._together = seed, blocks, together
        self._count, self._starts = int(blocks.sum()), blocks.cumsum(0) - blocks
        self._epoch, self._blocks, self._ends = -1, blocks, blocks

    def __call__(self, positions: Tensor) -> Tensor:
        """positions [B] int64 >= 0 -> items [B] int64."""
        items = torch.empty_like(positions)
        epochs = positions // self._count
        for epoch in epochs.unique().tolist():
            self._begin(epoch)
            rows = (epochs == epoch).nonzero()[:, 0]
            places = positions[rows] % self._count
            stretches = torch.bucketize(places, self._ends[self._together - 1 :: self._together].contiguous(), right=True)
            for stretch in stretches.unique().tolist():
                chosen = stretches == stretch
                items[rows[chosen]] = self._within(epoch, stretch, places[chosen])
        return items

    def _begin(self, epoch: int) -> None:
        if epoch != self._epoch:
            count = len(self._sizes)
            self._blocks = order(derive(self._seed, "blocks"), count, epoch * count + torch.arange(count))
            self._ends, self._epoch = self._sizes[self._blocks].cumsum(0), epoch

    def _within(self, epoch: int, stretch: int, places: Tensor) -> Tensor:
        first = stretch * self._together
        blocks = self._blocks[first : first + self._together]
        start = int(self._ends[first - 1]) if first else 0
        ends = self._sizes[blocks].cumsum(0)
        count = int(ends[-1])
        shuffled = order(derive(self._seed, "stretch", epoch, stretch), count, places - start)
        block = torch.bucketize(shuffled, ends, right=True)
        return self._starts[blocks[block]] + shuffled - (ends[block] - self._sizes[blocks[block]])


def ordered(seed: int, items: Items) -> Callable[[Tensor], Tensor]:
    """The order of the items: positions [B] int64 -> items [B] int64."""
    return BlockOrder(seed, items.blocks, items.together) if isinstance(items, BlockItems) else partial(order, seed, len(items))


@dataclass(eq=False)
class Loader:
    """For each step, this rank's list of `micro_batches` batches, without end. Each iteration begins at `start`.

    Micro-batch a of rank r holds rows [(a * world_size + r) * m, + m) of the global batch, m = batch_size / (world_size * micro_batches);
    a batch is {"x": [m, ...], "label": [m], "index": [m] int64 positions in the run}. A corrupt item is replaced by the next readable one
    of the same epoch's permutation.

    Args:
        batch_size: global: over all ranks and micro-batches.
        start: samples seen before.
        workers: processes that read items one by one; not used by items that read in batches.
        max_corrupt: how many different corrupt items this rank meets before iteration raises RuntimeError with their names.

    Raises ValueError if batch_size does not divide or there are no items.
    """

    items: Items
    seed: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    micro_batches: int = 1
    start: int = 0
    workers: int = 0
    max_corrupt: int = 100
    corrupt: Corrupt = field(default_factory=dict, init=False)  # met so far by this rank

    def __post_init__(self) -> None:
        parts = self.world_size * self.micro_batches
        if self.batch_size % parts or self.batch_size < 1:
            near = max(1, round(self.batch_size / parts)) * parts
            raise ValueError(
                f"the batch of {self.batch_size} does not divide over {self.world_size} ranks x {self.micro_batches} micro-batches; "
                f"use a multiple of {parts}, such as {near}"
            )
        if not len(self.items):
            raise ValueError("there are no items to read; check the data set and the size of its split")

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        reader = _Reader(self.items, ordered(self.seed, self.items), self._most_corrupt)
        batches: Iterable[tuple[dict[str, Tensor], Corrupt]]
        if self.workers and not isinstance(self.items, BatchItems):
            batches = DataLoader(reader, batch_size=None, sampler=self._requests(), num_workers=self.workers)
        else:  # DataLoader would cost 50 microseconds per batch here
            batches = map(reader.__getitem__, self._requests())
        step: list[dict[str, Tensor]] = []
        for batch, corrupt in batches:
            self._note(corrupt)
            step.append(batch)
            if len(step) == self.micro_batches:
                yield step
                step = []

    def _requests(self) -> Iterator[Request]:
        """What this rank reads, one micro-batch after the other."""
        rows = torch.arange(self.batch_size).reshape(self.micro_batches, self.world_size, -1)[:, self.rank]
        at_once = min(_BLOCK, int(self.items.blocks.float().mean() * self.items.together)) if isinstance(self.items, BlockItems) else _BLOCK
        steps = max(1, at_once // rows.numel())
        start, order = self.start, ordered(self.seed, self.items)
        while True:
            positions = start + torch.arange(steps)[:, None, None] * self.batch_size + rows
            items = order(positions.flatten()).reshape_as(positions)
            yield from zip(positions.flatten(0, 1), items.flatten(0, 1))
            start += steps * self.batch_size

    @property
    def _most_corrupt(self) -> int:
        return min(self.max_corrupt, len(self.items) - 1)  # one item at least must be readable

    def _note(self, corrupt: Corrupt) -> None:
        for item, reason in corrupt.items():
            if item not in self.corrupt:
                self.corrupt[item] = reason
                log.warning("corrupt item %d of at most %d: %s; another takes its place", len(self.corrupt), self.max_corrupt, reason)
        if len(self.corrupt) > self._most_corrupt:
            names = "\n  ".join(self.corrupt.values())
            raise RuntimeError(
                f"{len(self.corrupt)} corrupt items, more than the limit; mend or remove them, or raise training.max_corrupt:\n  {names}"
            )


class _Reader(Dataset[tuple[dict[str, Tensor], Corrupt]]):
    """Turns a request into a batch, in a worker process or in this one."""

    def __init__(self, items: Items, order: Callable[[Tensor], Tensor], most_corrupt: int):
        self.items, self.order, self.most_corrupt = items, order, most_corrupt

    def __getitem__(self, request: Request) -> tuple[dict[str, Tensor], Corrupt]:
        positions, indices = request
        if isinstance(self.items, BatchItems):
            return {**self.items.batch(indices), "index": positions}, {}
        corrupt: Corrupt = {}
        rows = []
        for position, index in zip(positions.tolist(), indices.tolist()):
            row = self._read(position, index, corrupt)
            if row is None:
                return {}, corrupt
            rows.append(row)
        return {**default_collate(rows), "index": positions}, corrupt

    def _read(self, position: int, index: int, corrupt: Corrupt) -> dict[str, Tensor] | None:
        """The item, or the first readable one after it in its epoch, or None past the limit. Adds to `corrupt`."""
        count = len(self.items)
        first = position - position % count
        while len(corrupt) <= self.most_corrupt:
            try:
                return self.items[index]
            except CorruptItem as error:
                corrupt[index] = str(error)
            position = first + (position + 1) % count
            index = int(self.order(torch.tensor([position])))
        return None
