"""Images in tar shards, in a directory or an object store, as the package webdataset writes them."""

from __future__ import annotations

import io
import itertools
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple
from zlib import crc32

import torch
from pydantic import PositiveInt
from torch import Tensor

from gentrain.config import ConfigError, Fraction, option, register
from gentrain.data.base import Data, EmptySplit, check_split
from gentrain.data.buckets import Buckets, Side, nearest
from gentrain.data.captions import MOST, Captions, caption_in, caption_of
from gentrain.data.decode import SUFFIXES, ImageDecoder, corrupt, printable, sides
from gentrain.data.image_folder import check_shapes, fraction
from gentrain.data.tar import BLOCK, STORES, Ahead, Member, ahead, is_local, members, opened

log = logging.getLogger(__name__)

_RANGE = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # key, suffix: the key ends at the first dot of the last part
_MOST_SHARDS, _MOST_CLASSES = 1_000_000, 100_000
_UNLIKE = {True: "no label, unlike what is before it", False: "a label, unlike what is before it"}
_MOST_JSON = 2**20  # bytes
_HEAD = 2**16  # bytes of an image in which its size is looked for; of some formats it is told at the end
_THREADS = 16  # shards indexed at once: most of the time is spent waiting for an object store


@register("webdataset")
@dataclass
class WebDataset(Data):
    """Images in tar files: members KEY.jpg (or another image format) and, with classes, KEY.cls or KEY.json with a "label".

    With `captioned`, each has a text in place of a class: KEY.txt, or `field` of KEY.json.
    KEY ends at the first dot of the file's name; members with other suffixes are ignored. All headers are read once, so that samples can be
    drawn in any order; nothing is unpacked to disk. Images are cropped as those of image_folder. Whether one is held out depends on its KEY
    alone.
    """

    shards: str | list[str] = option(help="tar files: paths, or URLs of an object store; {000..123} stands for numbers")
    size: PositiveInt = option(64, "height and width that samples get", unit="pixels")
    held_out: Fraction = option(0.1, "part of the images that is kept from training")
    colours: Literal["rgb", "grey"] = option("rgb", "3 channels or 1")
    max_pixels: PositiveInt = option(50_000_000, "larger images count as corrupt: they could fill the memory", unit="pixels")
    licence: str = option("not stated", "origin and licence of the images, for the model card")
    classes: list[str] | None = option(
        None, "names of the labels 0, 1, ...; [] = ignore labels; null = the numbers up to the largest that is there, which a run records"
    )
    captioned: bool = option(False, "images have captions, not classes")
    field: str = option("text", "of KEY.json that holds the caption where there is no KEY.txt")
    buckets: Buckets | None = option(None, "shapes that images to train on get beside the square; {} = with their defaults")

    def __post_init__(self) -> None:
        self._shapes = check_shapes(self.buckets, self.size)
        if self.captioned and self.classes:
            raise ConfigError("captioned images have no classes; leave out one of the two", key="classes")
        try:
            self._archives()
        except ValueError as error:
            raise ConfigError(str(error), key="shards") from error

    @property
    def shape(self) -> tuple[int, ...]:
        return (3 if self.colours == "rgb" else 1, self.size, self.size)

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        return [(self.shape[0], *shape) for shape in self._shapes]

    @property
    def captions(self) -> Sequence[str]:
        return self._captions.all if self.captioned else ()

    @property
    def class_names(self) -> Sequence[str]:
        if self.captioned:
            return ()
        if self.classes is not None:
            return self.classes
        return [str(label) for label in range(1 + max((sample.label for sample in self._samples), default=-1))]

    def fit(self) -> None:
        patterns = [self.shards] if isinstance(self.shards, str) else self.shards
        self.shards = [str(Path(each.removeprefix("file://")).expanduser().absolute()) if is_local(each) else each for each in patterns]
        if self.classes is None:
            self.classes = list(self.class_names)

    def split(self, name: str) -> ShardItems:
        check_split(name)
        places = [place for place, each in enumerate(self._samples) if (fraction(each.key) < self.held_out) == (name == "held_out")]
        samples = [self._samples[place] for place in places]
        if not samples:
            raise EmptySplit(f"none of the {len(self._samples)} images falls into the {name} split; change held_out ({self.held_out})")
        classed = bool(self.class_names)
        items = ShardItems(
            self._archives(),
            self._stamps,
            "\n".join(sample.image.name for sample in samples),
            torch.tensor([(sample.archive, sample.image.header, sample.image.size, sample.image.check) for sample in samples]),
            torch.tensor([sample.label if classed else -1 for sample in samples]),
            ImageDecoder(self.size, self.colours, self.max_pixels),
            self._captions.places[places] if self.captioned else None,
        )
        if self.buckets is None or name == "held_out":
            return items
        return BucketedShardItems(**vars(items), shapes=self._shapes, buckets=torch.tensor([sample.bucket for sample in samples]))

    def _archives(self) -> list[str]:
        """Every shard's path or URL, in the order of `shards`. Raises ValueError for what names none."""
        patterns = [self.shards] if isinstance(self.shards, str) else self.shards
        archives = [archive for pattern in patterns for archive in expand(pattern)]
        if twice := next((archive for archive, next in itertools.pairwise(sorted(archives)) if archive == next), None):
            raise ValueError(f"{printable(twice)} is named twice")
        if not archives:
            raise ValueError("no shard is named")
        return archives

    @cached_property
    def _index(self) -> list[tuple[str, list[_Sample]]]:
        """Of each shard its stamp and its samples."""
        archives, labelled = self._archives(), self.classes != [] and not self.captioned
        wanted = _Wanted(labelled, self.field if self.captioned else None, self._shapes)
        with ThreadPoolExecutor(_THREADS) as threads:
            index = list(threads.map(_read_index, itertools.count(), archives, itertools.repeat(wanted)))
        samples = [sample for _, each in index for sample in each]
        if not samples:
            raise ValueError(f"no images in {archives[0]}, ... ({len(archives)}); looked for members KEY.SUFFIX, {' '.join(SUFFIXES)}")
        labelled = labelled and (bool(self.classes) or samples[0].label >= 0)
        for sample in samples:
            where = f"{archives[sample.archive]}: {sample.image.name}"
            if (sample.label >= 0) != labelled:
                raise ValueError(f"{where}: {_UNLIKE[labelled]}; give every image a label, or let classes=[] ignore them")
            if self.captioned and sample.caption is None:
                raise ValueError(f"{where}: no caption; give every image a member KEY.txt, or KEY.json with {self.field!r}")
            if self.classes and sample.label >= len(self.classes):
                raise ValueError(f"{where}: the label {sample.label} is none of the {len(self.classes)} classes")
        return index

    @cached_property
    def _samples(self) -> list[_Sample]:
        return [sample for _, samples in self._index for sample in samples]

    @cached_property
    def _captions(self) -> Captions:
        return Captions([sample.caption or "" for sample in self._samples])

    @property
    def _stamps(self) -> list[str]:
        return [stamp for stamp, _ in self._index]


def expand(pattern: str) -> Iterator[str]:
    """`pattern` with each {first..last} replaced by all numbers from first to last, padded like first. Raises ValueError."""
    if not pattern.isprintable():
        raise ValueError(f"the name {pattern!a} cannot be printed")
    if "::" in pattern or not (is_local(pattern) or pattern.partition("://")[0] in STORES):
        raise ValueError(f"{pattern} is neither a path nor a URL of {', '.join(f'{store}://' for store in STORES)}")
    text = _RANGE.split(pattern)  # text, first, last, text, ...
    ranges = [(int(first), int(last), len(first)) for first, last in zip(text[1::3], text[2::3])]
    if any(last < first for first, last, _ in ranges) or any(brace in part for part in text[::3] for brace in "{}"):
        raise ValueError(f"in {pattern}, expected {{first..last}} with two numbers, the smaller one first")
    if math.prod(last - first + 1 for first, last, _ in ranges) > _MOST_SHARDS:
        raise ValueError(f"{pattern} stands for more than {_MOST_SHARDS:,} shards")
    numbers = [[f"{number:0{width}}" for number in range(first, last + 1)] for first, last, width in ranges]
    for chosen in itertools.product(*numbers):
        yield "".join(itertools.chain.from_iterable(itertools.zip_longest(text[::3], chosen, fillvalue="")))


class _Sample(NamedTuple):
    """archive: its number. label: -1 where there is none. caption: None where there is none. bucket: the number of its shape."""

    archive: int
    key: str
    image: Member
    label: int
    caption: str | None
    bucket: int


class _Wanted(NamedTuple):
    """What is read of a sample beside its image. field: of captions, None = no captions. shapes: of buckets."""

    labels: bool
    field: str | None
    shapes: Sequence[Side]


def _read_index(number: int, archive: str, wanted: _Wanted) -> tuple[str, list[_Sample]]:
    """The archive's stamp and its samples. Raises ValueError, which names archive and member, whatever its storage raises."""
    try:
        with opened(archive) as shard:
            return shard.stamp, list(_samples_of(ahead(shard, archive), number, archive, wanted))
    except Exception as error:  # libraries of object stores raise exceptions of their own
        raise ValueError(printable(f"{archive}: {error or type(error).__name__}")) from error


def _samples_of(shard: Ahead, number: int, archive: str, wanted: _Wanted) -> Iterator[_Sample]:
    images: dict[str, Member] = {}
    buckets: dict[str, int] = {}
    labels: dict[str, int] = {}
    captions: dict[str, str] = {}
    keys: set[str] = set()
    for member in members(shard):
        named = _NAME.fullmatch(member.name)
        if named is None:
            continue
        key, suffix = named[1], f".{named[2].lower()}"
        keys.add(key)
        if suffix in SUFFIXES:
            if key in images:
                raise ValueError(f"{member.name}: a second image beside {images[key].name}")
            images[key] = member
            buckets[key] = _bucket(shard, member, wanted.shapes)
        elif wanted.field is not None and (suffix == ".txt" or (suffix == ".json" and key not in captions)):
            try:
                caption = _caption(shard, member, suffix, wanted.field)
            except ValueError as error:
                raise ValueError(f"{member.name}: {error}") from error
            if caption is not None:
                captions[key] = caption
        elif wanted.labels and (suffix == ".cls" or (suffix == ".json" and key not in labels)):
            try:
                label = _label(shard, member, suffix)
            except ValueError as error:
                raise ValueError(f"{member.name}: {error}") from error
            if label is not None:
                labels[key] = label
    if len(images) < len(keys):
        log.warning("%s: %d keys have no image and are left out", printable(archive), len(keys) - len(images))
    for key, image in images.items():
        yield _Sample(number, key, image, labels.get(key, -1), captions.get(key), buckets[key])


def _bucket(shard: Ahead, member: Member, shapes: Sequence[Side]) -> int:
    """The number of the shape that is nearest to the image's; 0 where its head cannot be read: it will count as corrupt."""
    for length in (min(_HEAD, member.size), member.size) if len(shapes) > 1 else ():
        try:
            return nearest(*sides(io.BytesIO(shard.read(member.header + BLOCK, length))), shapes)
        except Exception:  # of hostile bytes, Pillow's decoders raise almost anything
            continue
    return 0


def _caption(shard: Ahead, member: Member, suffix: str, field: str) -> str | None:
    if member.size > (most := MOST if suffix == ".txt" else _MOST_JSON):
        raise ValueError(f"{member.size:,} bytes are more than {most:,}")
    data = shard.read(member.header + BLOCK, member.size)
    return caption_of(data) if suffix == ".txt" else caption_in(data, field)


def _label(shard: Ahead, member: Member, suffix: str) -> int | None:
    """The label that a member tells; None for a JSON file about something else."""
    if member.size > (most := 20 if suffix == ".cls" else _MOST_JSON):
        raise ValueError(f"{member.size:,} bytes are more than {most:,}")
    data = shard.read(member.header + BLOCK, member.size)
    label: object = None
    if suffix == ".json":
        try:
            content = json.loads(data)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(content, dict) or "label" not in content:
            return None
        label = content["label"]
    elif re.fullmatch(rb"\s*[0-9]{1,9}\s*", data):
        label = int(data)
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < _MOST_CLASSES:
        raise ValueError(f"a label is a whole number from 0 to {_MOST_CLASSES - 1:,}")
    return label


@dataclass(frozen=True, eq=False)
class ShardItems:
    """A split of the shards.

    Args:
        archives, stamps: of all shards.
        names: of the images, one a line: worker processes share one text, but would come to copy a list of many.
        places: [N, 4] int64: the shard's number, where the member's header begins, its bytes, the check of its header.
        label: [N] int64. captions: [N] int64, or None.
    """

    archives: Sequence[str]
    stamps: Sequence[str]
    names: str
    places: Tensor
    label: Tensor
    decoder: ImageDecoder
    captions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number, header, size, check = self.places[index].tolist()
        try:
            item = {"x": self._read(number, header, size, check, self._shape(index)), "label": self.label[index]}
        except Exception as error:
            name = self.names.split("\n")[index]
            raise corrupt(f"{self.archives[number]}: {name}", error) from error
        return item if self.captions is None else {**item, "caption": self.captions[index]}

    def _shape(self, index: int) -> Side | None:
        return None

    def _read(self, number: int, header: int, size: int, check: int, shape: Side | None) -> Tensor:
        self.decoder.check_length(size)
        with opened(self.archives[number]) as archive:
            if archive.stamp != self.stamps[number]:
                raise ValueError("the archive has changed since its headers were read; start again")
            data = archive.read(header, BLOCK + size)
        if crc32(data[:BLOCK]) != check:
            raise ValueError("the archive has changed since its headers were read; start again")
        return self.decoder.decode(io.BytesIO(data[BLOCK:]), shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class BucketedShardItems(ShardItems):
    """Images in the shapes of their buckets [N]."""

    shapes: Sequence[Side]
    buckets: Tensor

    def _shape(self, index: int) -> Side | None:
        return self.shapes[int(self.buckets[index])]
