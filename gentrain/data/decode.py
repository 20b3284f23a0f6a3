"""From the bytes of an image file, which anybody may have made, to a tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Literal

import torch
from torch import Tensor

from gentrain.data.base import CorruptItem
from gentrain.data.buckets import Side

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")  # what is left out of Pillow runs other programs or is rarely tested
_LONGEST = 20  # times the shorter side: beyond it a centre crop shows next to nothing of the image
_ORIENTATION = 0x0112  # of EXIF; from 5 on height and width are exchanged
_OVERHEAD = 2**24  # bytes of a file beside its pixels: colour profile, metadata
_TILE = (322, 323)  # of TIFF: width and height of a tile, which is decoded as a whole however small the image is
_MOST_TILE = 2**24  # pixels
_MOST_SCANS = 100  # of a JPEG, as libtiff allows: each passes over all pixels, whatever few bytes it has; encoders write about ten
_MARKER = re.compile(rb"\xff[^\0\xd0-\xd7\xff]")  # of JPEG, but for those within compressed data


@dataclass(frozen=True)
class ImageDecoder:
    """Resizes to the least size that covers what is asked for, and crops its centre; transparent parts become white; the camera's
    orientation is applied.

    Args:
        size: height and width of what comes out unless another shape is asked for, pixels.
        max_pixels: larger images are refused: they could fill the memory.
    """

    size: int
    colours: Literal["rgb", "grey"]
    max_pixels: int

    def check_length(self, length: int) -> None:
        """Raises ValueError for a file of more bytes than an image of `max_pixels` could need. length: bytes."""
        if length > (most := 4 * self.max_pixels + _OVERHEAD):
            raise ValueError(f"{length:,} bytes are more than {most:,}")

    def decode(self, file: BinaryIO, shape: Side | None = None) -> Tensor:
        """[C, height, width] float32 in [-1, 1]. Raises ValueError and more: of hostile bytes, Pillow's decoders raise almost anything."""
        import numpy as np
        from PIL import Image, ImageOps

        height, width = shape or (self.size, self.size)
        with _open(file) as image:
            long, short = max(image.size), min(image.size)
            if long * short > self.max_pixels:
                raise ValueError(f"{image.width} x {image.height} is more than {self.max_pixels} pixels")
            if long > _LONGEST * short:
                raise ValueError(f"{image.width} x {image.height} is more than {_LONGEST} times as long as wide")
            if (tile := float(np.prod([np.max(getattr(image, "tag_v2", {}).get(tag, 0)) for tag in _TILE]))) > _MOST_TILE:
                raise ValueError(f"a tile of {tile:,.0f} pixels is more than {_MOST_TILE:,}")
            if image.format in ("JPEG", "MPO") and (scans := _scans(file)) > _MOST_SCANS:
                raise ValueError(f"{scans:,} scans are more than {_MOST_SCANS}")
            if image.mode[0] in "IF":
                raise ValueError(f"pixels of more than 8 bits (mode {image.mode}) are not supported; convert the image")
            image.draft("RGB", (2 * max(height, width),) * 2)  # lets the JPEG decoder skip detail that resizing would drop
            upright = _opaque(ImageOps.exif_transpose(image)).convert("RGB" if self.colours == "rgb" else "L")
            # crops first, so that a long image is never enlarged as a whole
            cropped = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(cropped)).reshape(height, width, -1)
        return pixels.permute(2, 0, 1).float().contiguous() / 127.5 - 1


def sides(file: BinaryIO) -> Side:
    """Height and width of an image as it is seen, in pixels, from the head of its file. Raises as `ImageDecoder.decode` does."""
    with _open(file) as image:
        turned = image.getexif().get(_ORIENTATION, 1) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


def _open(file: BinaryIO) -> Image:
    from PIL import Image as images
    from PIL import UnidentifiedImageError

    try:
        return images.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"no image that can be read ({', '.join(FORMATS)})") from None  # whose message is about the Python object


def _scans(file: BinaryIO) -> int:
    """Of a JPEG, up to its end; other files may follow that."""
    file.seek(0)
    data, at, found = file.read(), 2, 0
    while (marker := _MARKER.search(data, at)) and (kind := marker[0][1]) != 0xD9:
        found += kind == 0xDA
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    return found


def corrupt(name: str, error: Exception) -> CorruptItem:
    """The item of that name, which could not be read."""
    return CorruptItem(printable(f"{name}: {error or type(error).__name__}"))


def printable(message: str) -> str:
    """The message, escaped where it holds more than text: names may hold commands for terminals."""
    return message if message.isprintable() else ascii(message)


def _opaque(image: Image) -> Image:
    from PIL import Image as images

    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return images.alpha_composite(images.new("RGBA", image.size, "white"), image)
