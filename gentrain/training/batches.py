"""What each step reads: rows of the data and, beside them, as many of each of the method's pools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from gentrain.data.base import Data, Items
from gentrain.data.loader import Loader
from gentrain.data.tokens import TokenData
from gentrain.methods.base import Batch, part_of
from gentrain.models.base import Codec
from gentrain.noise import Noise, derive
from gentrain.training.run import RunConfig
from gentrain.training.world import World


def batches(run: RunConfig, world: World, digests: Mapping[str, str], start: int) -> Iterator[list[Batch]]:
    """For each step this rank's micro-batches, without end; a function of (seed, samples seen).

    Args:
        digests: role -> digest of its weights, of the roles that drew the pools.
        start: samples seen before.

    Raises ConfigError when a pool is missing, or was drawn by other weights than those of its role.
    """

    def read(items: Items, seed: int) -> Iterator[list[Batch]]:
        training = run.training
        loader = Loader(
            items, seed, training.batch_size, world.rank, world.size, training.micro_batches,
            start=start, workers=training.data_workers, max_corrupt=training.max_corrupt,
        )  # fmt: skip
        return iter(loader)

    streams = {}
    for name, pool in run.method.pools().items():
        pool.require(digests[pool.role])
        vocabulary = run.data.vocabulary if isinstance(run.data, TokenData) else 0
        found = pool.items(tuple(run.data.shape), len(run.data.class_names), vocabulary)
        streams[name] = read(found, derive(run.seed, "pool", name))
    for step in read(run.data.split("train"), run.seed):
        for name, stream in streams.items():
            for batch, more in zip(step, next(stream), strict=True):
                batch.update({f"{name}/{key}": value for key, value in more.items()})
        yield step


def encoded(batch: Batch, data: Data, codec: Codec, seed: int, device: torch.device) -> Batch:
    """A batch as methods see it, on the device: its own rows augmented and through the codec, those of each part "<part>/x" through it.

    What is drawn for a row belongs to its position, so that it is the same on any number of ranks.
    """
    batch = {key: value.to(device) for key, value in batch.items()}
    parts = {key.partition("/")[0] for key in batch if "/" in key} - {"condition"}
    own = {key: value for key, value in batch.items() if key.partition("/")[0] not in parts}
    own = data.augment(own, Noise(derive(seed, "augment"), batch["index"], device))
    found = codec.encode(own, Noise(derive(seed, "codec"), batch["index"], device))
    for part in sorted(parts):
        rows = codec.encode(part_of(batch, part), Noise(derive(seed, "codec", part), batch["index"], device))
        found = found | {f"{part}/{key}": value for key, value in rows.items()}
    return found
