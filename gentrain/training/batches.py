"""What each step reads: rows of the data and, beside them, as many of each of the method's pools."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch

from gentrain.data.base import Data, Items
from gentrain.data.loader import Loader
from gentrain.data.tokens import TokenData
from gentrain.methods.base import Batch, part_of
from gentrain.models.base import Codec
from gentrain.noise import Noise, derive
from gentrain.training.run import RunConfig
from gentrain.training.world import World


def batches(run: RunConfig, world: World, codec: Codec, digests: Mapping[str, str], start: int) -> Iterator[list[Batch]]:
    """For each step this rank's micro-batches, without end; a function of (seed, samples seen).

    Args:
        codec: the run's, whose latents a pool may hold and whose names its labels are of.
        digests: role -> digest of its weights, of the roles that drew the pools.
        start: samples seen before.

    Raises ConfigError when a pool is missing, or was drawn by other weights than those of its role; likewise of what these weights said.
    """

    def read(items: Items, seed: int) -> Iterator[list[Batch]]:
        training = run.training
        loader = Loader(
            items, seed, training.batch_size, world.rank, world.size, training.micro_batches,
            start=start, workers=training.data_workers, max_corrupt=training.max_corrupt,
        )  # fmt: skip
        return iter(loader)

    def known(name: str, items: Items) -> Items:
        found = run.method.known_likelihood()
        return items if found is None else found.beside(name, items, digests[found.role])

    streams = {}
    for name, pool in run.method.pools().items():
        pool.require(digests[pool.role])
        vocabulary = run.data.vocabulary if isinstance(run.data, TokenData) else 0
        found = pool.items(tuple(run.data.shape), len(codec.names), vocabulary, tuple(codec.shape))
        streams[name] = read(known(name, found), derive(run.seed, "pool", name))
    for step in read(known("data", run.data.split("train")), run.seed):
        for name, stream in streams.items():
            for batch, more in zip(step, next(stream), strict=True):
                batch.update({f"{name}/{key}": value for key, value in more.items()})
        yield step


def encoded(batch: Batch, data: Data, codec: Codec, seed: int, device: torch.device, drawn: Collection[str] = ()) -> Batch:
    """A batch as methods see it, on the device: its own rows augmented and through the codec, those of each part "<part>/x" through it.

    Of the parts `drawn`, pools of samples, latents stay as they were drawn, and the condition is what the label asked for then.
    What is drawn for a row belongs to its position, so that it is the same on any number of ranks.
    """
    batch = {key: value.to(device) for key, value in batch.items()}
    parts = {key.partition("/")[0] for key in batch if "/" in key} - {"condition"}
    own = {key: value for key, value in batch.items() if key.partition("/")[0] not in parts}
    own = data.augment(own, Noise(derive(seed, "augment"), batch["index"], device))
    found = codec.encode(own, Noise(derive(seed, "codec"), batch["index"], device))
    for part in sorted(parts):
        rows = part_of(batch, part)
        if part not in drawn:
            rows = codec.encode(rows, Noise(derive(seed, "codec", part), batch["index"], device))
        else:
            if rows["x"].shape[1:] != torch.Size(codec.shape):
                x = codec.encode({"x": rows["x"]}, Noise(derive(seed, "codec", part), batch["index"], device))["x"]
                rows = {**rows, "x": x}
            condition = codec.condition(rows["label"]) or {}
            rows |= {key if key == "label" else f"condition/{key}": value for key, value in condition.items()}
        found = found | {f"{part}/{key}": value for key, value in rows.items()}
    return found
