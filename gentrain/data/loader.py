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

from gentrain.data.base import BatchItems, BlockItems, BucketItems, CorruptItem, Items
from gentrain.noise import Noise, derive

log = logging.getLogger(__name__)

_BLOCK = 2**14  # positions put in order at once: a call of `order` costs some milliseconds, for one position or for thousands
_ROUNDS = 10  # with 8 the permutations of 6 items are still measurably uneven

Request = tuple[Tensor, Tensor]  # positions [m] and the items [m] that `order` puts there
Corrupt = dict[int, str]  # item -> what is wrong with it
Order = Callable[..., Tensor]  # (positions, shift=0) -> items, see `ordered`


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


def bucket_rows(buckets: Tensor) -> list[Tensor]:
    """buckets [N] int64 of items -> for each bucket that has items, these [n] in order."""
    return [(buckets == bucket).nonzero()[:, 0] for bucket in buckets.unique().tolist()]


class BucketOrder:
    """The order of items in buckets: each batch of a run holds items of one bucket. A function of (seed, position), without state.

    Each bucket's items are a stream of its own, one permutation of them after the other. Epoch e of all has the batches that have become
    full in e + 1 passes of each bucket and had not in e: floor((e + 1) n / B) - floor(e n / B) of n items, whose buckets come in an order
    of their own. So every item comes once in each pass of its bucket, buckets come in proportion to their items, and nothing is left out
    or repeated to fill a batch.

    Args:
        buckets: [N] int64. batch_size: B, of all ranks and micro-batches.
    """

    def __init__(self, seed: int, buckets: Tensor, batch_size: int):
        self._seed, self._batch, self._count = seed, batch_size, len(buckets)
        self._members = bucket_rows(buckets)
        self._sizes = torch.tensor([len(members) for members in self._members])
        self._epoch = self._first = -1

    def __call__(self, positions: Tensor, shift: int = 0) -> Tensor:
        """positions [B] int64 >= 0 -> items [B] int64; `shift`: those that come so many places later in the pass of their bucket."""
        steps, inverse = (positions // self._batch).unique(return_inverse=True)
        bucket, number = torch.tensor([self._place(step) for step in steps.tolist()]).T
        bucket, stream = bucket[inverse], number[inverse] * self._batch + positions % self._batch
        items = torch.empty_like(positions)
        for each in bucket.unique().tolist():
            rows, size = bucket == each, int(self._sizes[each])
            begun = stream[rows] // size * size
            items[rows] = self._members[each][order(derive(self._seed, "bucket", each), size, begun + (stream[rows] + shift) % size)]
        return items

    def _place(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and which of the bucket's batches it is."""
        epoch = step * self._batch // self._count  # or a later one, for batches that are not full yet
        while int(self._before(epoch + 1).sum()) <= step:
            epoch += 1
        if epoch != self._epoch:
            self._begin(epoch)
        return self._places[step - self._first]

    def _begin(self, epoch: int) -> None:
        before = self._before(epoch)
        ends = (self._before(epoch + 1) - before).cumsum(0)
        count = int(ends[-1])
        buckets = torch.bucketize(order(derive(self._seed, "steps", epoch), count, torch.arange(count)), ends, right=True)
        numbers = torch.empty_like(buckets)
        for bucket, first in enumerate(before.tolist()):
            rows = (buckets == bucket).nonzero()[:, 0]
            numbers[rows] = first + torch.arange(len(rows))
        self._epoch, self._first, self._places = epoch, int(before.sum()), list(zip(buckets.tolist(), numbers.tolist()))

    def _before(self, epoch: int) -> Tensor:
        """Batches of each bucket before an epoch."""
        return epoch * self._sizes // self._batch


def ordered(seed: int, items: Items, batch_size: int) -> Order:
    """The order of the items: positions [B] int64 -> items [B] int64, or those that come so many places later in the same epoch."""
    if isinstance(items, BucketItems):
        return BucketOrder(seed, items.buckets, batch_size)
    count = len(items)
    in_place = BlockOrder(seed, items.blocks, items.together) if isinstance(items, BlockItems) else partial(order, seed, count)
    return partial(_shifted, in_place, count)


def _shifted(in_place: Callable[[Tensor], Tensor], count: int, positions: Tensor, shift: int = 0) -> Tensor:
    return in_place(positions // count * count + (positions + shift) % count)


@dataclass(eq=False)
class Loader:
    """For each step, this rank's list of `micro_batches` batches, without end. Each iteration begins at `start`.

    Micro-batch a of rank r holds rows [(a * world_size + r) * m, + m) of the global batch, m = batch_size / (world_size * micro_batches);
    a batch is {"x": [m, ...], "label": [m], "index": [m] int64 positions in the run}. A corrupt item is replaced by the next readable one
    of the same epoch's permutation, and of its own bucket. Items in buckets come one bucket a step, on all ranks.

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
        reader = _Reader(self.items, ordered(self.seed, self.items, self.batch_size), self._most_corrupt)
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
        at_once = _BLOCK
        if isinstance(self.items, BlockItems):
            at_once = min(at_once, int(self.items.blocks.float().mean() * self.items.together))
        elif isinstance(self.items, BucketItems):  # an epoch of few items costs as much as one of many
            at_once = min(at_once, len(self.items))
        steps = max(1, at_once // rows.numel())
        start, order = self.start, ordered(self.seed, self.items, self.batch_size)
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

    def __init__(self, items: Items, order: Order, most_corrupt: int):
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
        first, shift = index, 0
        while len(corrupt) <= self.most_corrupt:
            if shift and index == first:  # of a bucket, which may hold fewer than the limit
                raise RuntimeError(f"none of {shift} items of one shape can be read; mend or remove them: {corrupt[index]}")
            try:
                return self.items[index]
            except CorruptItem as error:
                corrupt[index] = str(error)
            shift += 1
            index = int(self.order(torch.tensor([position]), shift))
        return None
