"""The stage `encode`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import default_collate

from gentrain.cluster.fleet import spread
from gentrain.config import ConfigError, Document, build, load_plugins, loaded_plugins, option, register, to_dict
from gentrain.data.augmented import Augmented
from gentrain.data.base import BatchItems, BucketItems, CorruptItem, Data, EmptySplit, Items, Wrapped
from gentrain.data.latents import DEVIATION, MANIFEST, MEAN, TEXTS, Manifest, Shard, file_digest
from gentrain.data.loader import bucket_rows
from gentrain.data.toys import UNLIMITED
from gentrain.models.base import Model
from gentrain.models.pretrained import Pretrained
from gentrain.recipes.base import Stage

log = logging.getLogger(__name__)

_AT_ONCE = 64  # images
_FILE = "{name}-{number:05d}.safetensors"


@register("encode")
@dataclass
class Encode(Stage):
    """Encodes a data set once, for the data set `latents`: posteriors of its images, and what the text encoders make of its texts.

    Shards that an interrupted attempt finished are kept. Images that cannot be read are left out, and named in the log.
    """

    model: Model = option(help="the pipeline: a pretrained network")
    data: Data = option(help="the data set to encode")
    shard: PositiveInt = option(1_024, "rows of a file", unit="samples")
    actors: NonNegativeInt = option(
        0, "size of the Ray fleet, at most one per core, or per GPU; its nodes share the directory; 0 = in this process, without Ray"
    )

    def __post_init__(self) -> None:
        if not isinstance(self.model, Pretrained):
            raise ConfigError(f"{self.model.registered_name} has no latents; name a pretrained network", key="model")
        if _augmented(self.data):
            raise ConfigError("what changes anew in each step cannot be encoded once; name the data set below `augmented`", key="data")

    def settings(self) -> dict[str, Any]:
        values = super().settings()
        del values["actors"]
        if not self.model.awaited:  # one that an earlier stage writes is known by that stage
            values["encoder"] = self.model.encoder_digest  # type: ignore[attr-defined]  # its files may change where they lie
        return values

    def execute(self, directory: Path) -> None:
        assert isinstance(self.model, Pretrained)
        try:
            self.data.fit()
            codec = self.model.codec(self.data)
            splits = {"train": self.data.split("train")}
            with suppress(EmptySplit):  # nothing need be held out
                splits["held_out"] = self.data.split("held_out")
        except ValueError as error:
            raise ConfigError(str(error), key="data") from error
        if any(len(items) >= UNLIMITED for items in splits.values()):
            raise ConfigError(f"{self.data.registered_name} has no end; name data that has", key="data")
        directory.mkdir(parents=True, exist_ok=True)
        rows: dict[str, list[Tensor]] = {"train": [], "held_out": []}
        for name, items in splits.items():
            rows[name] = [part for bucket in _buckets(items) for part in bucket.split(self.shard) if len(part)]
        texts = codec.names if codec.takes_prompts else ()
        rows |= {TEXTS: list(torch.arange(len(texts)).split(self.shard)) if texts else []}
        told = [self.model.encoder_digest, to_dict(self.data), self.shard, *map(len, splits.values()), list(texts)]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        shards = self._shards(directory.absolute(), digest, rows)
        manifest = Manifest(
            encoder=self.model.encoder_digest, shape=list(codec.shape), class_names=list(self.data.class_names),
            captions=list(self.data.captions), weighted=self.data.weighted, licence=self.data.licence, data=to_dict(self.data),
            texts=shards.pop(TEXTS), splits=shards,
        )  # fmt: skip
        if len(codec.shapes) > 1:
            manifest["shapes"] = [list(shape) for shape in codec.shapes]
        temporary = directory / f".{MANIFEST}"
        temporary.write_text(json.dumps(manifest, indent=1))
        os.replace(temporary, directory / MANIFEST)

    def _shards(self, directory: Path, digest: str, rows: dict[str, list[Tensor]]) -> dict[str, list[Shard]]:
        """Of each split, and of the texts, all files: those that are there, and those that are made."""
        found = {(name, number): present(directory, digest, name, number) for name, parts in rows.items() for number in range(len(parts))}
        # clones: a part would carry all rows to every actor
        missing = [(name, number, rows[name][number].clone()) for name, number in found if found[name, number] is None]
        arguments = (to_dict(self.model), to_dict(self.data), str(directory), digest, loaded_plugins())
        made = spread(Encoder, arguments, "write", missing, self.actors, "files of the cache")
        for (name, number, _), left_out in zip(missing, made, strict=True):
            for what in left_out:
                log.warning("left out: %s", what)
            found[name, number] = present(directory, digest, name, number)
            if found[name, number] is None:
                raise ConfigError(f"{directory} is not there for all nodes; name one that they share, or set actors=0", key="actors")
        return {name: [shard for number in range(len(parts)) if (shard := found[name, number])] for name, parts in rows.items()}


class Encoder:
    """Writes files of a cache: in the process of the stage, or in each actor of its fleet.

    Args:
        model, data: their configuration. digest: of all that the files depend on; stands in the head of each.
    """

    def __init__(self, model: dict[str, Any], data: dict[str, Any], directory: str, digest: str, plugins: list[str]):
        load_plugins(Document({"plugins": plugins}, "fleet"))
        self.data = build(Data, Document(data, "fleet"))
        self.codec: Any = build(Model, Document(model, "fleet")).codec(self.data)
        self.codec.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.directory, self.digest = Path(directory), digest
        self._split = cache(self.data.split)

    def write(self, name: str, number: int, rows: Tensor) -> list[str]:
        """The file of these rows of a split, or of the texts; what is left out of it, because it cannot be read. Raises ConfigError."""
        left_out: list[str] = []
        if name == TEXTS:
            parts = [self._texts(part) for part in rows.split(_AT_ONCE)]
        else:
            parts = [self._latents(batch) for batch in _batches(self._split(name), rows, left_out)]
        if not parts:
            raise ConfigError(f"none of the {len(rows)} images of {name} from number {rows[0]} on can be read", key="data")
        path = self.directory / _FILE.format(name=name, number=number)
        temporary = path.with_name(f".{path.name}")
        save_file({key: torch.cat([part[key] for part in parts]).contiguous() for key in parts[0]}, temporary, {"digest": self.digest})
        os.replace(temporary, path)
        return left_out

    def _latents(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mean, deviation = self.codec.posterior(batch["x"].to(self.codec.device))
        return {**batch, MEAN: mean.cpu(), DEVIATION: deviation.cpu()}

    def _texts(self, places: Tensor) -> dict[str, Tensor]:
        return {key: value.cpu() for key, value in self.codec.condition(places).items() if key != "null"}


def present(directory: Path, digest: str, name: str, number: int) -> Shard | None:
    """A file of a cache if it was written whole, from the same inputs."""
    path = directory / _FILE.format(name=name, number=number)
    try:
        with safe_open(path, "pt") as file:
            head, rows = file.metadata() or {}, file.get_slice(next(iter(file.keys()))).get_shape()[0]
    except (OSError, SafetensorError):
        return None
    return Shard(file=path.name, rows=rows, sha256=file_digest(path)) if head.get("digest") == digest else None


def _augmented(data: Data) -> bool:
    return isinstance(data, Augmented) or (isinstance(data, Wrapped) and _augmented(data.data))


def _buckets(items: Items) -> list[Tensor]:
    """The items whose x have one shape, in order."""
    return bucket_rows(items.buckets) if isinstance(items, BucketItems) else [torch.arange(len(items))]


def _batches(items: Items, rows: Tensor, left_out: list[str]) -> Iterator[dict[str, Tensor]]:
    """The readable ones of these items, some at once; what is wrong with the others is added to `left_out`."""
    for part in rows.split(_AT_ONCE):
        if isinstance(items, BatchItems):
            yield items.batch(part)
            continue
        read = []
        for index in part.tolist():
            try:
                read.append(items[index])
            except CorruptItem as error:
                left_out.append(str(error))
        if read:
            yield default_collate(read)
