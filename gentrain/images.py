"""Images to look at."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor


def save_grid(images: Tensor, path: Path, columns: int, scale: int = 2) -> None:
    """Writes [N, C, H, W] in [-1, 1] (C = 1 or 3) as one PNG of `columns` a row, row by row, pixels enlarged `scale` times.

    Raises ValueError for another number of channels.
    """
    from PIL import Image

    count, channels, height, width = images.shape
    if channels not in (1, 3):
        raise ValueError(f"only grey and RGB images can be drawn, got {channels} channels")
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    rows = -(-count // columns)
    sheet = pixels.new_zeros(rows * columns, channels, height + 2, width + 2)
    sheet[:count, :, 1:-1, 1:-1] = pixels
    sheet = sheet.reshape(rows, columns, channels, height + 2, width + 2).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    picture = Image.fromarray(sheet.squeeze(-1).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)


def save_image(image: Tensor, path: Path) -> None:
    """Writes [C, H, W] in [-1, 1] (C = 1 or 3) as a PNG, as it is. Raises ValueError for another number of channels."""
    from PIL import Image

    if len(image) not in (1, 3):
        raise ValueError(f"only grey and RGB images can be written, got {len(image)} channels")
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).contiguous().numpy()).save(path)
