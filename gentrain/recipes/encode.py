"""The stage `encode`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import default_collate

from gentrain.config import ConfigError, option, register, to_dict
from gentrain.data.base import BatchItems, BucketItems, CorruptItem, Data, Items
from gentrain.data.latents import DEVIATION, MANIFEST, MEAN, Manifest, Shard, file_digest
from gentrain.data.loader import bucket_rows
from gentrain.models.base import Model
from gentrain.models.pretrained import Pretrained, PretrainedCodec
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

    def __post_init__(self) -> None:
        if not isinstance(self.model, Pretrained):
            raise ConfigError(f"{self.model.registered_name} has no latents; name a pretrained network", key="model")

    def execute(self, directory: Path) -> None:
        assert isinstance(self.model, Pretrained)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.data.fit()
            codec = self.model.codec(self.data).to(device)
        except ValueError as error:
            raise ConfigError(str(error), key="data") from error
        assert isinstance(codec, PretrainedCodec)
        directory.mkdir(parents=True, exist_ok=True)
        encoder = self.model.encoder_digest
        told = json.dumps([encoder, to_dict(self.data), self.shard], sort_keys=True)
        writer = _Writer(directory, hashlib.sha256(told.encode()).hexdigest())
        splits = {name: self._images(writer, codec, name) for name in ("train", "held_out")}
        manifest = Manifest(
            encoder=encoder, shape=list(codec.shape), class_names=list(self.data.class_names), captions=list(self.data.captions),
            licence=self.data.licence, data=to_dict(self.data), splits=splits, texts=self._texts(writer, codec),
        )  # fmt: skip
        if len(codec.shapes) > 1:
            manifest["shapes"] = [list(shape) for shape in codec.shapes]
        temporary = directory / f".{MANIFEST}"
        temporary.write_text(json.dumps(manifest, indent=1))
        os.replace(temporary, directory / MANIFEST)

    def _images(self, writer: _Writer, codec: PretrainedCodec, split: str) -> list[Shard]:
        items, shards = self.data.split(split), []
        for number, rows in enumerate(part for bucket in _buckets(items) for part in bucket.split(self.shard)):
            shard = writer.present(split, number)
            if shard is None:
                parts = [_encoded(codec, batch) for batch in _batches(items, rows)]
                if not parts:
                    raise ConfigError(f"none of the {len(rows)} images of {split} from number {rows[0]} on can be read", key="data")
                shard = writer.write(split, number, {key: torch.cat([part[key] for part in parts]) for key in parts[0]})
            shards.append(shard)
        return shards

    def _texts(self, writer: _Writer, codec: PretrainedCodec) -> list[Shard]:
        """Of every caption, or class."""
        shards: list[Shard] = []
        if not codec.family.takes_text:
            return shards
        for number, first in enumerate(range(0, len(codec.names), self.shard)):
            places = torch.arange(first, min(first + self.shard, len(codec.names)))
            shard = writer.present("texts", number)
            if shard is None:
                parts = [codec.condition(part) or {} for part in places.split(_AT_ONCE)]
                texts = {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0] if key != "null"}
                shard = writer.write("texts", number, texts)
            shards.append(shard)
        return shards


class _Writer:
    """Files of a cache. `digest` of everything that they depend on stands in the head of each."""

    def __init__(self, directory: Path, digest: str):
        self.directory, self.digest = directory, digest

    def present(self, name: str, number: int) -> Shard | None:
        """The file if it was written whole, from the same inputs."""
        path = self.directory / _FILE.format(name=name, number=number)
        try:
            with safe_open(path, "pt") as file:
                head, rows = file.metadata() or {}, len(file.get_slice(next(iter(file.keys())))[:])
        except (OSError, SafetensorError):
            return None
        return Shard(file=path.name, rows=rows, sha256=file_digest(path)) if head.get("digest") == self.digest else None

    def write(self, name: str, number: int, tensors: dict[str, Tensor]) -> Shard:
        path = self.directory / _FILE.format(name=name, number=number)
        temporary = path.with_name(f".{path.name}")
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, {"digest": self.digest})
        os.replace(temporary, path)
        return Shard(file=path.name, rows=len(next(iter(tensors.values()))), sha256=file_digest(path))


def _buckets(items: Items) -> list[Tensor]:
    """The items whose x have one shape, in order."""
    return bucket_rows(items.buckets) if isinstance(items, BucketItems) else [torch.arange(len(items))]


def _batches(items: Items, rows: Tensor) -> Iterator[dict[str, Tensor]]:
    """The readable ones of these items, some at once."""
    for part in rows.split(_AT_ONCE):
        if isinstance(items, BatchItems):
            yield items.batch(part)
            continue
        read = []
        for index in part.tolist():
            try:
                read.append(items[index])
            except CorruptItem as error:
                log.warning("left out: %s", error)
        if read:
            yield default_collate(read)


def _encoded(codec: PretrainedCodec, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    mean, deviation = codec.posterior(batch["x"].to(codec.device))
    return {**batch, MEAN: mean.cpu(), DEVIATION: deviation.cpu()}
