"""Images of any size on disk, one folder per class."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from gentrain.config import Fraction, option, register
from gentrain.data.base import Data, check_split
from gentrain.data.decode import SUFFIXES, ImageDecoder, corrupt

log = logging.getLogger(__name__)


@register("image_folder")
@dataclass
class ImageFolder(Data):
    """Every image below `path`/CLASS/, at any depth; CLASS is its label, classes are sorted by name.

    The shorter side is resized to `size` and the centre cropped; transparent parts become white; the camera's orientation is applied.
    Links below `path` are not followed. Whether an image is held out depends on its own relative path alone, so new files move no old ones.
    """

    path: str = option(help="the folder that holds one folder per class")
    size: PositiveInt = option(64, "height and width that samples get", unit="pixels")
    held_out: Fraction = option(0.1, "part of the images that is kept from training")
    colours: Literal["rgb", "grey"] = option("rgb", "3 channels or 1")
    max_pixels: PositiveInt = option(50_000_000, "larger images count as corrupt: they could fill the memory", unit="pixels")
    licence: str = option("not stated", "origin and licence of the images, for the model card")
    classes: list[str] | None = option(
        None, "names of the class folders, in the order of their labels; null = those that are there, which a run records"
    )

    @property
    def shape(self) -> tuple[int, ...]:
        return (3 if self.colours == "rgb" else 1, self.size, self.size)

    @property
    def class_names(self) -> Sequence[str]:
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

    def split(self, name: str) -> ImageItems:
        check_split(name)
        files = [file for file in self._files if (fraction(file) < self.held_out) == (name == "held_out")]
        if not files:
            message = (
                f"none of the {len(self._files)} images below {self.path} falls into the {name} split; change held_out ({self.held_out})"
            )
            raise ValueError(message)
        number = {name: index for index, name in enumerate(self.class_names)}
        labels = torch.tensor([number[file.split("/")[0]] for file in files])
        return ImageItems(Path(self.path).expanduser(), files, labels, ImageDecoder(self.size, self.colours, self.max_pixels))


def _refuse(error: OSError) -> None:
    raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def fraction(name: str) -> float:
    """A name's place in [0, 1), the same on every machine: those below `held_out` are held out, whatever other names there are."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64


@dataclass(frozen=True, eq=False)
class ImageItems:
    """A split of a folder: `files` are relative to `root`, `labels` [N] int64."""

    root: Path
    files: Sequence[str]
    labels: Tensor
    decoder: ImageDecoder

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        file = self.root / self.files[index]
        try:
            return {"x": self._read(file), "label": self.labels[index]}
        except Exception as error:
            raise corrupt(str(file), error) from error

    def _read(self, file: Path) -> Tensor:
        # what was a file when the folder was read may be a link or a pipe by now: neither is followed or waited for
        with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as opened:
            info = os.fstat(opened.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise ValueError("not a regular file")
            self.decoder.check_length(info.st_size)
            return self.decoder.decode(opened)
