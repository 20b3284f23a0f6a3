"""Publishes checkpoints of given shards, as the ranks of a run do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gentrain.training.checkpoint import STATE, Shard, manifest, shard_file, write_shard
from gentrain.training.storage import Storage


def publish(storage: Storage, samples: int, shards: Mapping[str, Sequence[Shard]], **state: Any) -> str:
    """The name of a checkpoint that holds each stem's shards, one per rank."""
    name = f"{samples:012d}"
    storage.prepare(name)
    hashes = {}
    for stem, ranks in shards.items():
        for rank, shard in enumerate(ranks):
            file = shard_file(stem, rank)
            hashes[file] = storage.put(name, file, lambda path, shard=shard: write_shard(path, shard))
    content = json.dumps({"samples": samples, **state})
    hashes[STATE] = storage.put(name, STATE, lambda path: path.write_text(content))
    storage.publish(name, manifest(hashes))
    return name
