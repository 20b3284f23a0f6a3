"""Images per second of every data set that reads files, and how long a training step waits for them.

    python benchmarks/loader.py                  # 2,000 JPEGs of 256 x 256 pixels on this disk; some minutes on two idle cores
    python benchmarks/loader.py --images 500 --rounds 1

Each entry reads one epoch, decoded, resized to 64 pixels and put into batches of 64, after a first batch that is not counted; printed is
the median of the rounds and their extremes. `waits` is what a step of a UNet of 16 and 32 channels at 64 pixels, batch 64, spends waiting
for its batch, as a share of the step, in a run whose batches are read by that many processes: what is 0 is hidden.
"""

from __future__ import annotations

import io
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from gentrain.config import Document, build
from gentrain.data.base import Data
from gentrain.data.loader import Loader
from gentrain.training.callbacks import Callback
from gentrain.training.loop import Trainer, train
from gentrain.training.run import parse_run
from gentrain.training.world import join, leave

SIDE, SIZE, BATCH, CLASSES = 256, 64, 64, 4


def written(root: Path, count: int) -> dict[str, dict[str, Any]]:
    """The same images in every form: data set -> its configuration."""
    import datasets

    datasets.disable_progress_bars()
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    files = []
    for pixels in coarse:
        file = io.BytesIO()
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    for name in range(CLASSES):
        (root / "folder" / str(name)).mkdir(parents=True)
    for i, data in enumerate(files):
        (root / "folder" / str(i % CLASSES) / f"{i}.jpg").write_bytes(data)
    (root / "shards").mkdir()
    for number in range(4):
        with tarfile.open(root / "shards" / f"{number:03}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for i in range(number, count, 4):
                for suffix, data in (("jpg", files[i]), ("cls", str(i % CLASSES).encode())):
                    info = tarfile.TarInfo(f"{i:06}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    (root / "parquet" / "data").mkdir(parents=True)
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": data, "path": None} for data in files], "label": [i % CLASSES for i in range(count)]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(c) for c in range(CLASSES)])}),
    )
    table.to_parquet(root / "parquet/data/train-00000-of-00001.parquet", batch_size=100)
    hub = {"name": "huggingface", "path": str(root / "parquet"), "size": SIZE, "held_out": 0.01}
    return {
        "image_folder": {"name": "image_folder", "path": str(root / "folder"), "size": SIZE, "held_out": 0.01},
        "webdataset": {"name": "webdataset", "shards": str(root / "shards" / "{000..003}.tar"), "size": SIZE, "held_out": 0.01},
        "huggingface, local": hub,
        "huggingface, streamed": {**hub, "streaming": True},
    }


def speed(data: dict[str, Any], workers: int) -> float:
    """Images per second of an epoch."""
    items = build(Data, Document(data, "benchmark")).split("train")
    batches = iter(Loader(items, 0, BATCH, workers=workers))
    next(batches)
    start, count = time.perf_counter(), len(items) // BATCH
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - start)


def waits(data: dict[str, Any], workers: int, root: Path) -> float:
    """The share of a step that waits for its batch, the median over steps."""
    shares: list[float] = []

    class Watch(Callback):
        def __init__(self, trainer: Trainer):
            pass

        def after_step(self, trainer: Trainer) -> None:
            shares.append(trainer.waited_s / trainer.step_s)

    run = parse_run(
        Document(
            {
                "method": "flow_matching", "data": data, "model": {"name": "unet", "channels": [16, 32]}, "engine": "torch",
                "training": {"samples": 6 * BATCH, "batch_size": BATCH, "data_workers": workers}, "output": str(root),
            },
            "benchmark",
        )
    )  # fmt: skip
    run.directory.mkdir()
    train(run, join(), lambda: False, [Watch])
    return statistics.median(shares[2:])


def main(
    images: Annotated[int, typer.Option(help="how many")] = 2_000,
    rounds: Annotated[int, typer.Option(help="repetitions of each entry")] = 3,
    workers: Annotated[list[int], typer.Option(help="reading processes; 0 = the one that trains")] = [0, 1, 2],  # noqa: B006
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    table = Table("", *(f"{each} workers" for each in workers), *(f"waits, {each}" for each in workers), title="images per second")
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for name, data in written(root, images).items():
            cells = []
            for each in workers:
                speeds = [speed(data, each) for _ in range(rounds)]
                cells.append(f"{statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})")
            cells += [f"{waits(data, each, root / f'run-{name}-{each}'):.2f}" for each in workers]
            table.add_row(name, *cells)
    leave()
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
