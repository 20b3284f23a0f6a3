"""Bytes that are not the images they claim to be."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encoded(form, size=(64, 64), mode="RGB"):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise.squeeze()).save(buffer, form)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height):
    """A PNG that claims a size and has no pixels to speak of."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def text_bomb():
    """A PNG whose comment unpacks to 100 MB."""
    png = encoded("PNG")
    return png[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 9)) + png[33:]


def scans(count, size=(64, 64)):
    """A progressive JPEG of one colour, of whose scans one that has hardly any bytes is repeated."""
    buffer = io.BytesIO()
    Image.new("L", size, 128).save(buffer, "JPEG", progressive=True)
    jpeg = buffer.getvalue()
    start = jpeg.rindex(b"\xff\xda")
    return jpeg[:start] + jpeg[start:-2] * count + jpeg[-2:]


def tiled(side):
    """A TIFF of 9 x 9 pixels in one tile of side x side, all of it zeros."""
    data = zlib.compress(bytes(1000))
    tags = {256: 9, 257: 9, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 134, 325: len(data)}
    return b"II*\0" + struct.pack("<IH", 8, 10) + b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in tags) + bytes(4) + data


def sixteen_bits():
    buffer = io.BytesIO()
    Image.fromarray(np.full((9, 9), 300, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


HOSTILE = {
    "empty.png": b"",
    "text.jpg": b"<html>not found</html>",
    "zeros.png": bytes(1000),
    "magic_only.png": b"\x89PNG\r\n\x1a\n",
    **{
        f"truncated.{form.lower()}": encoded(form)[: len(encoded(form)) // 2]
        for form in ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
    },
    "flipped_bytes.png": encoded("PNG")[:200] + bytes(64) + encoded("PNG")[264:],
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(never run) print\n",
    "rarely_tested.png": encoded("PCX"),
    "bomb.png": png_header(60_000, 60_000),
    "warned_bomb.png": png_header(10_000, 10_000),
    "thread.png": encoded("PNG", (2000, 1)),
    "no_width.png": png_header(0, 10),
    "sixteen_bits.png": sixteen_bits(),
    "text_bomb.png": text_bomb(),
    "scans.jpg": scans(200),
    "tile_bomb.tiff": tiled(30_000),
}
