"""Images of any size on disk, one folder per class, or each with a caption."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from gentrain.config import ConfigError, Fraction, errors_about, option, register
from gentrain.data.base import Data, EmptySplit, check_split
from gentrain.data.buckets import Buckets, Side, nearest
from gentrain.data.captions import MOST, Captions, caption_in, caption_of
from gentrain.data.decode import SUFFIXES, ImageDecoder, corrupt, printable, sides

log = logging.getLogger(__name__)

METADATA = "metadata.jsonl"
_MOST_METADATA = 2**30  # bytes


@register("image_folder")
@dataclass
class ImageFolder(Data):
    """Every image below `path`/CLASS/, at any depth; CLASS is its label, classes are sorted by name.

    With `captioned`, folders are no classes and images may lie in `path` itself; each has a text: in NAME.txt beside NAME.png, or in a file
    metadata.jsonl of its folder or one above, lines {"file_name": path from there, "text": ...}.
    Images are resized to cover `size` x `size`, or the shape of their bucket, and their centre is cropped; transparent parts become white;
    the camera's orientation is applied.
    Links below `path` are not followed. Whether an image is held out depends on its own relative path alone, so new files move no old ones.
    """

    path: str = option(help="the folder that holds one folder per class, or captioned images")
    size: PositiveInt = option(64, "height and width that samples get", unit="pixels")
    held_out: Fraction = option(0.1, "part of the images that is kept from training")
    colours: Literal["rgb", "grey"] = option("rgb", "3 channels or 1")
    max_pixels: PositiveInt = option(50_000_000, "larger images count as corrupt: they could fill the memory", unit="pixels")
    licence: str = option("not stated", "origin and licence of the images, for the model card")
    classes: list[str] | None = option(
        None, "names of the class folders, in the order of their labels; null = those that are there, which a run records"
    )
    captioned: bool = option(False, "images have captions, not classes")
    field: str = option("text", "of the lines of metadata.jsonl that holds the caption")
    buckets: Buckets | None = option(None, "shapes that images to train on get beside the square; {} = with their defaults")

    def __post_init__(self) -> None:
        self._shapes = check_shapes(self.buckets, self.size)
        if self.captioned and self.classes:
            raise ConfigError("captioned images have no classes; leave out one of the two", key="classes")

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
        return self.classes if self.classes is not None else sorted({file.split("/")[0] for file in self._files})

    def fit(self) -> None:
        self.path = str(Path(self.path).expanduser().absolute())
        if self.classes is None:
            self.classes = list(self.class_names)

    @cached_property
    def _files(self) -> list[str]:
        """Paths of all images, relative to `path`, sorted. Raises ValueError if there are none."""
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise ValueError(f"no such folder: {root} (path: {self.path!r}, looked for from {Path.cwd()})")
        files, links = [], 0
        for folder, folders, names in os.walk(root, onerror=_refuse):
            entries = [Path(folder, name) for name in names if name.lower().endswith(SUFFIXES)]
            links += sum(Path(folder, name).is_symlink() for name in folders) + sum(entry.is_symlink() for entry in entries)
            files += [entry.relative_to(root).as_posix() for entry in entries if entry.is_file() and not entry.is_symlink()]
        if links:
            log.warning("%s: %d links were not followed", root, links)
        if self.captioned:
            if not files:
                raise ValueError(f"no images below {root}; looked for {root}/**/*({' '.join(SUFFIXES)}), links not followed")
            return sorted(files)
        classed = sorted(file for file in files if "/" in file)
        if wrong := [file for file in classed if not file.split("/")[0].isprintable()]:
            raise ValueError(f"the name of the folder {wrong[0].split('/')[0]!r} below {root} cannot be printed; rename it")
        if len(classed) < len(files):
            log.warning("%s: %d images lie in no class folder and are left out", root, len(files) - len(classed))
        if not classed:
            raise ValueError(f"no images below {root}; looked for {root}/CLASS/**/*({' '.join(SUFFIXES)}), links not followed")
        if self.classes is not None and (others := sorted({file.split("/")[0] for file in classed} - set(self.classes))):
            raise ValueError(
                f"the folder {others[0]!r} below {root} is none of the classes {', '.join(self.classes)}; give it its former name, move it "
                "away, or train a run of its own"
            )
        return classed

    @cached_property
    def _captions(self) -> Captions:
        """Of all images. Raises ValueError where one has none, or two."""
        root = Path(self.path).expanduser()
        folders = {parent for file in self._files for parent in (root / file).parents if parent.is_relative_to(root)}
        told: dict[str, str] = {}
        for folder in sorted(folders):
            for file, text in _told_in(folder / METADATA, self.field):
                place = os.path.normpath((folder / file).relative_to(root)) if not os.path.isabs(file) else file
                if told.setdefault(place, text) != text:
                    raise ValueError(printable(f"{root / place} has two captions in files {METADATA}; leave one"))
        texts = []
        for file in self._files:
            beside = _beside(root / file)
            if beside is not None and told.get(file, beside) != beside:
                raise ValueError(printable(f"{root / file} has one caption beside it and another one in {METADATA}; leave one"))
            caption = told.get(file, beside)
            if caption is None:
                wanted = (root / file).with_suffix(".txt").name
                raise ValueError(printable(f"{root / file} has no caption; write {wanted} beside it (an empty one will do)"))
            texts.append(caption)
        return Captions(texts)

    def split(self, name: str) -> ImageItems:
        check_split(name)
        places = [place for place, file in enumerate(self._files) if (fraction(file) < self.held_out) == (name == "held_out")]
        files = [self._files[place] for place in places]
        if not files:
            message = (
                f"none of the {len(self._files)} images below {self.path} falls into the {name} split; change held_out ({self.held_out})"
            )
            raise EmptySplit(message)
        number = {name: index for index, name in enumerate(self.class_names)}
        labels = torch.tensor([-1 if self.captioned else number[file.split("/")[0]] for file in files])
        captions = self._captions.places[places] if self.captioned else None
        items = ImageItems(Path(self.path).expanduser(), files, labels, ImageDecoder(self.size, self.colours, self.max_pixels), captions)
        if self.buckets is None or name == "held_out":
            return items
        return BucketedImageItems(**vars(items), shapes=self._shapes, buckets=items.in_buckets(self._shapes))


def check_shapes(buckets: Buckets | None, size: int) -> list[Side]:
    """The shapes of the buckets, the square alone without. Raises ConfigError."""
    with errors_about("buckets"):
        return [(size, size)] if buckets is None else buckets.shapes(size)


def _told_in(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """File name and caption of each line of a file of metadata. Raises ValueError, which names the line."""
    try:
        data = contents(path, _MOST_METADATA)
    except OSError as error:
        raise ValueError(printable(f"{path} cannot be read: {error.strerror or error}")) from error
    for number, line in enumerate((data or b"").splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = caption_in(line, field)
            file = json.loads(line).get("file_name")
            if text is None or not isinstance(file, str):
                raise ValueError(f"no object with file_name and {field!r}")
        except ValueError as error:
            raise ValueError(printable(f"line {number} of {path}: {error}; mend it")) from error
        yield file, text


def _beside(image: Path) -> str | None:
    path = image.with_suffix(".txt")
    try:
        data = contents(path, MOST)
        return None if data is None else caption_of(data)
    except (OSError, ValueError) as error:
        raise ValueError(printable(f"{path}: {error}; write a caption in UTF-8")) from error


def contents(path: Path, most: int) -> bytes | None:
    """Of a regular file, None where it is not there. Raises OSError, and ValueError for what is no such file or has more bytes."""
    try:
        with regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > most:
                raise ValueError(f"{size:,} bytes are more than {most:,}")
            return file.read()
    except FileNotFoundError:
        return None


@contextmanager
def regular(path: Path) -> Iterator[BinaryIO]:
    """What was a file when the folder was read may be a link or a pipe by now: neither is followed or waited for. Raises ValueError."""
    with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise ValueError("not a regular file")
        yield opened


def _refuse(error: OSError) -> None:
    raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def fraction(name: str) -> float:
    """A name's place in [0, 1), the same on every machine: those below `held_out` are held out, whatever other names there are."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64


@dataclass(frozen=True, eq=False)
class ImageItems:
    """A split of a folder: `files` are relative to `root`, `labels` [N] int64, `captions` [N] int64 or None."""

    root: Path
    files: Sequence[str]
    labels: Tensor
    decoder: ImageDecoder
    captions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        file = self.root / self.files[index]
        try:
            item = {"x": self._read(file, index), "label": self.labels[index]}
        except Exception as error:
            raise corrupt(str(file), error) from error
        return item if self.captions is None else {**item, "caption": self.captions[index]}

    def _read(self, file: Path, index: int) -> Tensor:
        with regular(file) as opened:
            self.decoder.check_length(os.fstat(opened.fileno()).st_size)
            return self.decoder.decode(opened, self._shape(index))

    def _shape(self, index: int) -> Side | None:
        return None

    def in_buckets(self, shapes: Sequence[Side]) -> Tensor:
        """[N] int64: the shape that is nearest to each image's own; the first where the head of its file cannot be read."""
        found = []
        for name in self.files:
            try:
                with regular(self.root / name) as file:
                    found.append(nearest(*sides(file), shapes))
            except Exception:  # it counts as corrupt when it is read
                found.append(0)
        return torch.tensor(found)


@dataclass(frozen=True, eq=False, kw_only=True)
class BucketedImageItems(ImageItems):
    """Images in the shapes of their buckets [N]."""

    shapes: Sequence[Side]
    buckets: Tensor

    def _shape(self, index: int) -> Side | None:
        return self.shapes[int(self.buckets[index])]
