"""The data set `huggingface`: parquet files in a directory, mapped and streamed, what save_to_disk writes, a directory of images."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from gentrain.config import ConfigError
from gentrain.data.base import BlockItems, CorruptItem
from gentrain.data.decode import _OVERHEAD
from gentrain.data.huggingface import HuggingFace
from gentrain.data.loader import BlockOrder, Loader

COUNT = 60


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((10, 12, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def value_of(x: Tensor) -> int:
    return round(float((x.flatten()[0] + 1) * 127.5))


FEATURES = datasets.Features(
    {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"]), "weight": datasets.Value("float32")}
)


def table(first: int, count: int, image: Any = None) -> datasets.Dataset:
    rows = range(first, first + count)
    images = [{"bytes": png(i), "path": None} if image is None else image for i in rows]
    return datasets.Dataset.from_dict(
        {"image": images, "label": [i % 3 for i in rows], "weight": [1.0 + i for i in rows]}, features=FEATURES
    )


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows in two files, in row groups of 7 and fewer, and 9 rows of a test split."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "data").mkdir()
    datasets.disable_progress_bars()
    table(0, 40).to_parquet(folder / "data/train-00000-of-00002.parquet", batch_size=7)
    table(40, 20).to_parquet(folder / "data/train-00001-of-00002.parquet", batch_size=7)
    table(100, 9).to_parquet(folder / "data/test-00000-of-00001.parquet")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def data(path: Path, **fields: Any) -> HuggingFace:
    return HuggingFace(str(path), size=8, **fields)


@pytest.mark.parametrize("streaming", [False, True])
def test_every_row_comes_once_an_epoch_with_its_image_label_and_weight(parquet: Path, streaming: bool) -> None:
    split = data(parquet, streaming=streaming, held_out=0.0, weight="weight", together=2).split("train")
    batches = iter(Loader(split, seed=0, batch_size=20))
    for _ in range(2):
        rows = [next(batches)[0] for _ in range(3)]
        x, label, weight = (torch.cat([row[key] for row in rows]) for key in ("x", "label", "weight"))
        values = [value_of(each) for each in x]
        assert sorted(values) == list(range(COUNT)) and values != sorted(values)
        assert [value % 3 for value in values] == label.tolist() and [1.0 + value for value in values] == weight.tolist()
    assert x.shape[1:] == (3, 8, 8) and x.dtype == torch.float32


@pytest.mark.parametrize("streaming", [False, True])
def test_the_order_is_that_of_one_rank_on_any_number_and_after_any_stop(parquet: Path, streaming: bool) -> None:
    def read(rank: int, size: int, start: int = 0, steps: int = 8, workers: int = 0) -> list[list[int]]:
        split = data(parquet, streaming=streaming, together=3).split("train")
        steps_of = iter(Loader(split, seed=3, batch_size=12, rank=rank, world_size=size, start=start, workers=workers))
        return [[value_of(x) for x in next(steps_of)[0]["x"]] for _ in range(steps)]

    whole = read(0, 1)  # beyond the first epoch
    assert [a + b + c for a, b, c in zip(*(read(rank, 3) for rank in range(3)))] == whole
    assert read(0, 1, start=36, steps=5) == whole[3:]
    assert [a + b for a, b in zip(*(read(rank, 2, start=60, steps=3) for rank in range(2)))] == whole[5:]
    assert read(0, 1, workers=2) == whole


def test_streaming_reads_each_row_group_once_an_epoch_and_holds_few(parquet: Path) -> None:
    split: Any = data(parquet, streaming=True, held_out=0.0, together=3).split("train")
    assert isinstance(split, BlockItems) and split.blocks.tolist() == [7, 7, 7, 7, 7, 5, 7, 7, 6]
    reads, read = [], split.table._read
    split.table._read = lambda block: reads.append(block) or read(block)
    batches = iter(Loader(split, seed=1, batch_size=10))
    for _ in range(6):
        next(batches)
        assert len(split.table._held) <= 3
    assert sorted(reads) == list(range(9)) and reads != sorted(reads)


@pytest.mark.parametrize("together", [1, 2, 100])
def test_an_order_in_blocks_is_a_permutation_of_each_epoch_and_mixes_blocks(together: int) -> None:
    sizes = torch.tensor([3, 1, 8, 5, 2])
    order = BlockOrder(0, sizes, together)
    epochs = [order(torch.arange(19) + 19 * epoch) for epoch in range(3)]
    assert all(epoch.sort().values.tolist() == list(range(19)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    scattered = torch.tensor([40, 3, 22, 3, 0, 56])
    assert torch.equal(order(scattered), torch.cat(epochs)[scattered])
    block = torch.repeat_interleave(torch.arange(5), sizes)[epochs[0]]
    changes = int((block[1:] != block[:-1]).sum())
    assert changes == 4 if together == 1 else changes > 4


def test_blocks_and_the_rows_in_them_come_in_another_order_each_time() -> None:
    order = BlockOrder(0, torch.full((6,), 8), 1)
    epochs = [order(torch.arange(48) + 48 * epoch).reshape(6, 8) for epoch in range(2)]
    assert not torch.equal(epochs[0][:, 0] // 8, epochs[1][:, 0] // 8)
    assert len({tuple(rows) for epoch in epochs for rows in (epoch % 8).tolist()}) == 12


def test_rows_are_held_out_by_their_number_or_by_their_split(parquet: Path) -> None:
    def values(streaming: bool, name: str, **fields: Any) -> set[int]:
        split = data(parquet, streaming=streaming, **fields).split(name)
        return {value_of(split[i]["x"]) for i in range(len(split))}

    train, held_out = values(False, "train", held_out=0.3), values(False, "held_out", held_out=0.3)
    assert train | held_out == set(range(COUNT)) and not train & held_out and 8 <= len(held_out) <= 28
    assert values(True, "held_out", held_out=0.3) == held_out and values(False, "held_out", held_out=0.1) < held_out
    for streaming in (False, True):
        assert values(streaming, "held_out", held_out_split="test") == set(range(100, 109))
        assert values(streaming, "train", held_out_split="test") == set(range(COUNT))


def test_a_run_records_classes_and_rows_and_refuses_others(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(parquet.parent)
    for streaming in (False, True):
        fitted = data(Path(parquet.name), streaming=streaming)
        fitted.fit()
        assert (fitted.classes, fitted.rows, fitted.path) == (["a", "b", "c"], COUNT, str(parquet))
        with pytest.raises(ValueError, match="has 60 rows in train, not the 59 of the run's start; set"):
            data(parquet, streaming=streaming, rows=59).fit()


def test_what_save_to_disk_wrote_and_directories_of_images_are_read(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(0, 5)}).save_to_disk(tmp_path / "saved")
    split = data(tmp_path / "saved", held_out=0.0).split("train")
    assert [value_of(split[i]["x"]) for i in range(5)] == list(range(5))
    for name in ("cat", "dog"):
        (tmp_path / "images/train" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "images/train" / name / f"{i}.png").write_bytes(png(40 * (i + 1)))
    folder = data(tmp_path / "images", held_out=0.0)
    assert folder.class_names == ["cat", "dog"]
    split = folder.split("train")
    assert sorted((int(split[i]["label"]), value_of(split[i]["x"])) for i in range(6)) == [(k, v) for k in (0, 1) for v in (40, 80, 120)]


PIXELS = 10_000
HOSTILE = [
    ({"bytes": b"", "path": None}, "no image that can be read"),
    ({"bytes": png(0)[:40], "path": None}, ""),
    ({"bytes": None, "path": "/etc/hostname"}, "lies outside of the data set"),
    ({"bytes": None, "path": "../../etc/hostname"}, "lies outside of the data set"),
    ({"bytes": None, "path": None}, "no image"),
    ({"bytes": png(0) + bytes(4 * PIXELS + _OVERHEAD), "path": None}, "bytes are more than"),
]


@pytest.mark.parametrize("image, message", HOSTILE)
def test_a_hostile_image_is_named_and_skipped(image: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = pa.table({"image": [{"bytes": png(i), "path": None} for i in range(3)] + [image], "label": [0, 1, 2, 0]})
    (tmp_path / "data").mkdir()
    pq.write_table(rows.replace_schema_metadata(table(0, 1).data.schema.metadata), tmp_path / "data/train-00000-of-00001.parquet")
    for streaming in (False, True):
        split = data(tmp_path, streaming=streaming, held_out=0.0, classes=["a", "b", "c"], max_pixels=PIXELS).split("train")
        with pytest.raises(CorruptItem, match=f"row 3: .*{message}"):
            split[3]
        loader = Loader(split, seed=0, batch_size=4)
        assert all(value_of(x) < 3 for x in next(iter(loader))[0]["x"]) and len(loader.corrupt) == 1


def test_labels_that_no_class_has_are_corrupt(parquet: Path, tmp_path: Path) -> None:
    split = data(parquet, classes=["a", "b"], held_out=0.0).split("train")
    with pytest.raises(CorruptItem, match="row 2: the label 2 is none of the 2 classes"):
        split[2]
    (tmp_path / "data").mkdir()
    features = datasets.Features({key: FEATURES[key] for key in ("image", "label")})
    rows = datasets.Dataset.from_dict({"image": [{"bytes": png(0), "path": None}], "label": [-1]}, features=features)
    rows.to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    with pytest.raises(CorruptItem, match="row 0: the label -1 is none of the 3 classes"):  # the library's word for: not told
        data(tmp_path, held_out=0.0).split("train")[0]


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_no_loss_can_have_are_corrupt(weight: float, tmp_path: Path) -> None:
    columns = {"image": [{"bytes": png(i), "path": None} for i in range(2)], "label": [0, 1], "weight": [1.0, weight]}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "data/train-00000-of-00001.parquet")
    split = data(tmp_path, classes=["a", "b"], held_out=0.0, weight="weight").split("train")
    assert split[0]["weight"] == 1
    with pytest.raises(CorruptItem, match=r"row 1: the weight .* is none; weights are finite and not negative"):
        split[1]


def test_items_travel_to_other_processes_without_what_they_hold(parquet: Path) -> None:
    split: Any = data(parquet, streaming=True).split("train")
    first = split[0]
    copy = pickle.loads(pickle.dumps(split))
    assert not copy.table._held and torch.equal(copy[0]["x"], first["x"])


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"image": "picture"}, "has no column 'picture'; its columns: image, label, weight"),
    ({"label": "class"}, "has no column 'class'"),
    ({"train_split": "training"}, "training"),
    ({"held_out": 0.0}, "none of the 60 rows"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("fields, message", MISTAKES)
def test_mistakes_are_told(fields: dict[str, Any], message: str, streaming: bool, parquet: Path) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        data(parquet, streaming=streaming, **fields).split("held_out")


def test_what_is_no_parquet_is_not_streamed(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"image": 1, "label": 0}\n')
    with pytest.raises(ConfigError, match=r"only parquet files can be streamed, not .*train\.jsonl; set data.streaming to false"):
        data(tmp_path, streaming=True).split("train")


def test_a_name_on_the_hub_is_told_to_be_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(ValueError, match="nobody/nothing"):
        HuggingFace("nobody/nothing").split("train")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 rows, of which every third has the same text, and 4 of a test split."""
    folder = tmp_path_factory.mktemp("captioned")
    (folder / "data").mkdir()
    for name, first, count in (("train", 0, 30), ("test", 100, 4)):
        texts = ["the same" if i % 3 == 0 else f"number\n{i}" for i in range(first, first + count)]
        table(first, count).add_column("text", texts).to_parquet(folder / f"data/{name}-00000-of-00001.parquet", batch_size=7)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("held_out_split", [None, "test"])
def test_captions_belong_to_their_images_in_both_splits(captioned: Path, streaming: bool, held_out_split: str | None) -> None:
    read = data(captioned, label=None, caption="text", streaming=streaming, held_out_split=held_out_split, held_out=0.3)
    read.fit()
    assert not read.class_names and len(read.captions) == len(set(read.captions)) and "the same" in read.captions
    assert list(read.captions) == sorted(read.captions) and ("number 100" in read.captions) == (held_out_split is not None)
    seen = set()
    for name in ("train", "held_out"):
        split = read.split(name)
        for batch in (next(iter(Loader(split, seed=0, batch_size=len(split))))[0],):
            for x, place in zip(batch["x"], batch["caption"].tolist(), strict=True):
                value = value_of(x)
                seen.add(value)
                assert read.captions[place] == ("the same" if value % 3 == 0 else f"number {value}")
    assert seen == set(range(30)) | (set(range(100, 104)) if held_out_split else set())


@pytest.mark.parametrize("streaming", [False, True])
def test_captions_that_cannot_be_meant_are_told(streaming: bool, tmp_path: Path, captioned: Path) -> None:
    (tmp_path / "data").mkdir()
    table(0, 3).add_column("text", ["one", None, "three"]).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"row 1 of train: 'text' is no text; give every image a text"):
        data(tmp_path, label=None, caption="text", streaming=streaming).split("train")
    with pytest.raises(ConfigError, match="has no column 'words'; its columns: image, label, weight, text"):
        data(captioned, label=None, caption="words", streaming=streaming).split("train")
    with pytest.raises(ConfigError, match=r"label: captioned images have no classes; set data\.label to null"):
        data(captioned, caption="text")
