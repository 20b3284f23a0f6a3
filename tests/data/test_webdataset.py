"""Tar shards: the same samples in the same order however they are read, and nothing that a hostile archive could gain."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import logging
import os
import pickle
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gentrain.config import ConfigError, Document, build, to_dict
from gentrain.data import tar
from gentrain.data.base import BatchItems, CorruptItem, Data
from gentrain.data.buckets import Buckets
from gentrain.data.image_folder import ImageFolder
from gentrain.data.loader import Loader
from gentrain.data.webdataset import WebDataset, expand
from gentrain.training.world import World
from tests.data.hostile_images import HOSTILE
from tests.distributed.cases import Job, difference, state_of, train_all, values
from tests.reliability.buckets import served
from tests.reliability.hostile import contained

Content = Sequence[tuple[str | tarfile.TarInfo, bytes]]


def png(number: int, size: int = 9) -> bytes:
    """An image of a colour of its own."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (number % 256, number // 256, 255)).save(buffer, "PNG")
    return buffer.getvalue()


def archive(content: Content, form: int = tarfile.PAX_FORMAT, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, **options) as file:
        for name, data in content:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.size == 0:
                info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def sample(number: int, label: int | None = None) -> Content:
    label_of = [] if label is None else [(f"{number:04d}.cls", str(label).encode())]
    return [(f"{number:04d}.png", png(number)), *label_of]


def shard(numbers: Iterator[int] | range, classes: int = 3) -> bytes:
    return archive([each for number in numbers for each in sample(number, number % classes)])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """40 samples of three classes in four shards."""
    for number in range(4):
        (tmp_path / f"{number:03d}.tar").write_bytes(shard(range(10 * number, 10 * number + 10)))
    return tmp_path


def data_of(shards: Path | str, **options: Any) -> WebDataset:
    return WebDataset(f"{shards}/{{000..003}}.tar", size=8, **({"held_out": 0} | options))


def numbers(batch: dict[str, torch.Tensor]) -> list[int]:
    return ((batch["x"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def drawn(items: Any, positions: int, rank: int = 0, world_size: int = 1, start: int = 0, workers: int = 0) -> dict[int, int]:
    """Position -> the number of the sample that a loader of batches of 8 puts there."""
    loader = Loader(items, 5, 8, rank, world_size, start=start, workers=workers)
    steps = itertools.islice(loader, (positions - start) // 8)
    return {index: number for step in steps for batch in step for index, number in zip(batch["index"].tolist(), numbers(batch))}


# --- what is found ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_that_were_written(tmp_path: Path, form: int) -> None:
    folder = tarfile.TarInfo("a")
    folder.type = tarfile.DIRTYPE
    long = "a/" + "b" * (90 if form == tarfile.USTAR_FORMAT else 250)
    content = [
        (folder, b""), ("./a/1.png", png(1)), ("./a/1.cls", b" 2\n"), ("./a/1.txt", b"a caption"), ("README", b""), ("a/.hidden", b""),
        (f"{long}/2.seg.png", b"no image"), (f"{long}/2.json", b'{"label": 0, "more": [NaN]}'), (f"{long}/2.PNG", png(2)),
        ("d.ir/3.JSON", b'{"label": 7}'), ("d.ir/3.cls", b"1"), ("d.ir/3.png", png(3)), ("4.cls", b"0"), ("4.json", b'{"label": 9}'),
        ("4.png", png(4)), ("lonely.cls", b"5"),
    ]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(archive(content, form))
    data = WebDataset(str(tmp_path / "a.tar"), size=8, held_out=0)
    items = pickle.loads(pickle.dumps(data.split("train")))
    assert data.shape == (3, 8, 8) and data.class_names == ["0", "1", "2"] and not isinstance(items, BatchItems)
    assert items.names.split("\n") == ["a/1.png", f"{long}/2.PNG", "d.ir/3.png", "4.png"]
    assert [[*numbers({"x": items[index]["x"][None]}), int(items[index]["label"])] for index in range(4)] == [
        [1, 2],
        [2, 0],
        [3, 1],
        [4, 0],
    ]


def test_an_image_comes_out_as_from_a_folder(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 25, 3), dtype=np.uint8)
    (tmp_path / "c").mkdir()
    Image.fromarray(pixels).save(tmp_path / "c" / "1.jpg")
    (tmp_path / "a.tar").write_bytes(archive([("1.jpg", (tmp_path / "c" / "1.jpg").read_bytes())]))
    for colours in ("rgb", "grey"):
        one = WebDataset(str(tmp_path / "a.tar"), size=16, held_out=0, colours=colours).split("train")[0]["x"]  # type: ignore[arg-type]
        assert one.equal(ImageFolder(str(tmp_path), size=16, held_out=0, colours=colours).split("train")[0]["x"])  # type: ignore[arg-type]


def test_captions_are_those_that_were_written(tmp_path: Path) -> None:
    content = [
        ("1.png", png(1)), ("1.txt", b"two\n dogs "), ("1.cls", b"3"), ("2.json", b'{"text": "a cat", "label": 1}'), ("2.png", png(2)),
        ("3.json", b'{"text": "no"}'), ("3.txt", b""), ("3.png", png(3)), ("4.txt", b"a cat"), ("4.json", b'{"text": "no"}'),
        ("4.png", png(4)),
    ]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(archive(content))
    data = WebDataset(str(tmp_path / "a.tar"), size=8, held_out=0, captioned=True)
    items = pickle.loads(pickle.dumps(data.split("train")))
    assert data.captions == ["", "a cat", "two dogs"] and data.class_names == ()
    found = {numbers({"x": items[index]["x"][None]})[0]: data.captions[int(items[index]["caption"])] for index in range(4)}
    assert found == {1: "two dogs", 2: "a cat", 3: "", 4: "a cat"} and int(items[0]["label"]) == -1
    data.fit()
    assert build(Data, Document(to_dict(data), "config.yaml")).captions == data.captions  # type: ignore[type-abstract]
    assert "caption" not in WebDataset(str(tmp_path / "a.tar"), size=8, held_out=0, classes=[]).split("train")[0]


def test_captions_belong_to_their_images_in_both_splits(tmp_path: Path) -> None:
    content = [each for number in range(40) for each in ((f"{number}.png", png(number)), (f"{number}.json", b'{"alt": "is %d"}' % number))]
    (tmp_path / "a.tar").write_bytes(archive(content))
    data = WebDataset(str(tmp_path / "a.tar"), size=8, held_out=0.3, captioned=True, field="alt")
    for name in ("train", "held_out"):
        items = data.split(name)
        found = [
            (numbers({"x": item["x"][None]})[0], data.captions[int(item["caption"])]) for item in map(items.__getitem__, range(len(items)))
        ]
        assert len(found) > 5 and all(text == f"is {number}" for number, text in found)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("1.txt", b"\xff"), r"a\.tar: 1\.txt: .*utf-8"),
        (("1.txt", b"x" * 70_000), r"a\.tar: 1\.txt: 70,000 bytes are more than 65,536"),
        (("1.json", b'{"text": 3}'), r"a\.tar: 1\.json: 'text' is no text"),
        (("1.json", b"[" * 10_000), r"a\.tar: 1\.json: "),
        (("1.json", b'{"label": 3}'), r"a\.tar: 1\.png: no caption; give every image a member KEY\.txt"),
    ],
)
def test_captions_that_cannot_be_meant_are_told(tmp_path: Path, member: tuple[str, bytes], message: str) -> None:
    (tmp_path / "a.tar").write_bytes(archive([("1.png", png(1)), member]))
    with pytest.raises(ValueError, match=message):
        WebDataset(str(tmp_path / "a.tar"), size=8, held_out=0, captioned=True).split("train")
    with pytest.raises(ConfigError, match="classes: captioned images have no classes"):
        WebDataset(str(tmp_path / "a.tar"), captioned=True, classes=["a"])


def test_images_come_in_the_shapes_of_their_buckets_as_from_a_folder(tmp_path: Path) -> None:
    rng, sizes = np.random.default_rng(0), [(24, 24), (36, 16), (16, 36), (20, 60)]
    forms = ("png", "jpg", "webp", "tiff")  # some tell their size only at the end
    content = []
    for number, (height, width) in enumerate(sizes * 4):
        name = f"{number:02}.{forms[number // 4]}"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / name)
        content.append((name, (tmp_path / name).read_bytes()))
    (tmp_path / "hostile.tar").write_bytes(archive([*content, ("99.png", b"no image")]))
    options: Any = {"size": 24, "held_out": 0, "buckets": Buckets(step=4)}
    for name, _ in content:
        (tmp_path / name).with_suffix(".txt").write_text("x")
    folder: Any = ImageFolder(str(tmp_path), captioned=True, **options).split("train")
    items: Any = pickle.loads(pickle.dumps(WebDataset(str(tmp_path / "hostile.tar"), **options).split("train")))
    assert items.buckets[:16].tolist() == folder.buckets.tolist() and len(set(items.buckets.tolist())) == 4 and int(items.buckets[16]) == 0
    for index in range(16):
        assert items[index]["x"].equal(folder[index]["x"])
    with pytest.raises(CorruptItem, match=r"99\.png"):
        items[16]


def test_without_labels_there_are_no_classes(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(archive([*sample(1), ("0001.json", b'{"caption": "x"}'), *sample(2), ("0002.json", b"[]")]))
    for data in (WebDataset(str(tmp_path / "a.tar"), held_out=0, size=8), data_of(shards, classes=[])):
        items = data.split("train")
        assert data.class_names == [] and {int(items[index]["label"]) for index in range(len(items))} == {-1}


def test_what_a_run_has_recorded_stays_whatever_becomes_of_the_shards(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards)
    data = WebDataset(["{000..002}.tar", "003.tar"], size=8)
    data.fit()
    recorded = build(Data, Document(to_dict(data), "config.yaml"))
    monkeypatch.chdir("/")
    assert recorded.split("train").names == data.split("train").names  # type: ignore[attr-defined]
    for path in shards.iterdir():
        path.unlink()
    assert build(Data, Document(to_dict(data), "config.yaml")).class_names == ["0", "1", "2"], "sampling and exporting need no images"


def test_the_split_depends_on_the_key_alone_and_is_fixed_for_ever(shards: Path, tmp_path: Path) -> None:
    """In whatever shard a sample lies: else models trained before have seen what is now held out."""
    assert data_of(shards, held_out=0.1).split("held_out").names == "0004.png\n0008.png\n0010.png\n0013.png\n0014.png\n0025.png\n0033.png"
    train, held_out = (data_of(shards, held_out=0.4).split(name).names.split("\n") for name in ("train", "held_out"))
    assert len(train) + len(held_out) == 40 and not set(train) & set(held_out) and 8 <= len(held_out) <= 24
    (tmp_path / "all.tar").write_bytes(shard(iter([*range(60, 40, -1), *range(40)])))
    again = WebDataset(str(tmp_path / "all.tar"), held_out=0.4).split("held_out").names.split("\n")
    assert [name for name in again if name < "0040"] == held_out


@pytest.mark.parametrize(
    "pattern, archives",
    [
        ("a/{008..011}.tar", ["a/008.tar", "a/009.tar", "a/010.tar", "a/011.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("s3://b/{0..1}-{3..4}.tar", ["s3://b/0-3.tar", "s3://b/0-4.tar", "s3://b/1-3.tar", "s3://b/1-4.tar"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces_stand_for_numbers(pattern: str, archives: list[str]) -> None:
    assert list(expand(pattern)) == archives


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("{3..1}.tar", "the smaller one first"),
        ("{a..b}.tar", "expected {first..last} with two numbers"),
        ("{0..2", "expected {first..last}"),
        ("{0..999999999}.tar", "more than 1,000,000 shards"),
        ("{0..9999}{0..9999}.tar", "more than 1,000,000 shards"),
        ("pipe:curl evil", "no such"),
        ("http://x/a.tar", "neither a path nor a URL of s3://"),
        ("simplecache::s3://b/a.tar", "neither a path nor a URL"),
        ("reference::memory://a", "neither a path nor a URL"),
        ("s3://bucket/a.tar::memory://b", "neither a path nor a URL"),
        ("ssh://host/a.tar", "neither a path nor a URL"),
        ("a\x1b[2J.tar", "cannot be printed"),
        (["a.tar", "{0..1}.tar", "1.tar"], "1.tar is named twice"),
        ([], "no shard is named"),
    ],
)
def test_shards_that_cannot_be_meant_are_refused_when_the_configuration_loads(pattern: str | list[str], message: str) -> None:
    if message == "no such":  # a path like any other: nothing is run
        with pytest.raises(ValueError, match=r"pipe:curl evil: .*No such file"):
            WebDataset(pattern).split("train")
        return
    with pytest.raises(ConfigError) as caught:
        build(Data, Document({"name": "webdataset", "shards": pattern}, "run.yaml"))
    assert caught.value.key == "shards" and message in caught.value.message


# --- order ------------------------------------------------------------------------------------------------------------------------


def test_the_order_is_that_of_the_loader_on_any_number_of_ranks_and_workers(shards: Path) -> None:
    items = data_of(shards).split("train")
    alone = drawn(items, 80)
    assert sorted(alone) == list(range(80)) and all(sorted(list(alone.values())[e : e + 40]) == list(range(40)) for e in (0, 40))
    for workers in (0, 2):
        assert drawn(items, 80, 0, 2, workers=workers) | drawn(items, 80, 1, 2, workers=workers) == alone
    assert drawn(items, 80, start=24) == {position: number for position, number in alone.items() if position >= 24}


def test_a_run_that_stops_goes_on_as_if_it_had_not(shards: Path, tmp_path: Path) -> None:
    data = {"name": "webdataset", "shards": f"{shards}/{{000..003}}.tar", "size": 8, "held_out": 0.1}
    model = {"name": "unet", "channels": [8, 8], "attention": [], "norm_groups": 4}

    def settings_of(name: str) -> dict[str, Any]:
        return values(tmp_path / name, "flow_matching") | {"data": data, "model": model}

    world = World(0, 1, torch.device("cpu"))
    jobs = [Job(settings_of("whole")), Job(settings_of("halves"), stop_at=3), Job(settings_of("halves"))]
    assert [outcome for outcome, _ in train_all(world, jobs)] == ["finished", "stopped", "finished"]
    assert difference(state_of(tmp_path / "whole"), state_of(tmp_path / "halves")) == 0


# --- object stores ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> str:
    """The URL of a memory file system with the shards of `shards`."""
    import fsspec

    url = f"memory://{uuid.uuid4()}"
    for number in range(4):
        fsspec.filesystem("memory").pipe_file(f"{url}/{number:03d}.tar", shard(range(10 * number, 10 * number + 10)))
    return url


def test_an_object_store_gives_what_a_directory_gives(shards: Path, memory: str) -> None:
    for name in ("train", "held_out"):
        here, there = (data_of(where, held_out=0.2).split(name) for where in (shards, memory))
        assert here.names == there.names and here.places.equal(there.places) and here.label.equal(there.label)
        assert all(here[index]["x"].equal(there[index]["x"]) for index in range(len(here)))


def test_headers_are_read_with_few_requests_and_nothing_else_is(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem as Memory

    asked: list[tuple[int, int]] = []
    cat_file = Memory.cat_file

    def counted(self: Any, path: str, start: int, end: int) -> bytes:
        asked.append((start, end))
        return cat_file(self, path, start, end)

    monkeypatch.setattr(Memory, "cat_file", counted)
    items = data_of(memory).split("train")
    assert len(asked) == 4  # shards of less than 64 KiB
    asked.clear()
    _ = items[17]
    assert len(asked) == 1 and asked[0][1] - asked[0][0] == tar.BLOCK + len(png(17))
    Memory().pipe_file(f"{memory}/large.tar", archive([(f"{number}.png", bytes(10**6)) for number in range(5)]))
    asked.clear()
    assert len(WebDataset(f"{memory}/large.tar", held_out=0).split("train")) == 5
    assert len(asked) <= 7 and sum(end - start for start, end in asked) < 500_000


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bucket_is_read_by_any_process(shards: Path, bucket: str, workers: int) -> None:
    assert drawn(data_of(bucket).split("train"), 40, workers=workers) == drawn(data_of(shards).split("train"), 40)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    import boto3

    with served("shards") as url:
        for number in range(4):
            body = shard(range(10 * number, 10 * number + 10))
            boto3.client("s3").put_object(Bucket="shards", Key=f"{number:03d}.tar", Body=body)
        yield url


def test_a_shard_that_is_not_there_is_named(tmp_path: Path, bucket: str, memory: str) -> None:
    for where in (tmp_path, bucket, memory):
        with pytest.raises(ValueError, match=rf"{where}/none.tar: "):
            WebDataset(f"{where}/none.tar").split("train")


# --- hostile archives -------------------------------------------------------------------------------------------------------------


def of_type(kind: bytes, name: str = "x.png", **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def header(change: Callable[[bytearray], object]) -> bytes:
    """A good sample, then one whose header is changed, its checksum being right."""
    good = archive(sample(1), tarfile.USTAR_FORMAT)[: tar.BLOCK * (2 + len(png(1)) // tar.BLOCK)]
    block = bytearray(archive([("x.png", png(2))], tarfile.USTAR_FORMAT))
    change(block)
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block[:512]):06o}\0 ".encode()
    return good + block


def put(offset: int, data: bytes) -> Callable[[bytearray], object]:
    return lambda block: block.__setitem__(slice(offset, offset + len(data)), data)


def pax(record: bytes, kind: bytes = tarfile.XHDTYPE, size: int | None = None, times: int = 1) -> bytes:
    """An extended header, or so many, with a record of its own making before a good sample."""
    info = of_type(kind, "pax", size=len(record) if size is None else size)
    start = info.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % tar.BLOCK)
    return start * times + archive(sample(1))


def record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n".encode()
    return next(line for n in range(9) if len(line := str(len(rest) + n).encode() + rest) == len(rest) + n)


GOOD = archive([*sample(1, 0), *sample(2, 1)])
HOSTILE_ARCHIVES: list[tuple[str, bytes, str]] = [
    ("empty", b"", "truncated"),
    ("zero bytes", bytes(10240), "no images in"),
    ("zeros without end", bytes(2**24), "more follows the end"),
    ("text", b"<html>not found</html>" * 100, "the first member: invalid header"),
    ("gzip", gzip.compress(GOOD), "compressed with gzip; random access needs a plain tar"),
    ("gzip bomb", gzip.compress(bytes(10**8)), "compressed with gzip"),
    ("bzip2", b"BZh91AY&SY" + bytes(600), "compressed with bzip2"),
    ("xz", b"\xfd7zXZ\0" + bytes(600), "compressed with xz"),
    ("zstd", b"\x28\xb5\x2f\xfd" + bytes(600), "compressed with zstd"),
    ("absolute name", archive([*sample(1), ("/etc/x.png", b"")]), "'/etc/x.png' leads out of the archive"),
    ("absolute name behind a dot", archive([*sample(1), (".//etc/x.png", b"")]), "'.//etc/x.png' leads out of the archive"),
    ("name that climbs", archive([*sample(1), ("a/../../x.png", b"")]), "leads out of the archive"),
    ("directory that climbs", archive([(of_type(tarfile.DIRTYPE, "../x"), b"")]), "leads out of the archive"),
    ("name that climbs, by a long header", archive([("../" + "x" * 200 + ".png", b"")], tarfile.GNU_FORMAT), "leads out of the archive"),
    ("symbolic link", archive([(of_type(tarfile.SYMTYPE, linkname="/etc/passwd"), b"")]), "x.png is a symbolic link"),
    ("hard link", archive([*sample(1), (of_type(tarfile.LNKTYPE, linkname="0001.png"), b"")]), "x.png is a hard link"),
    ("character device", archive([(of_type(tarfile.CHRTYPE), b"")]), "x.png is a device"),
    ("block device", archive([(of_type(tarfile.BLKTYPE), b"")]), "x.png is a device"),
    ("pipe", archive([(of_type(tarfile.FIFOTYPE), b"")]), "x.png is a pipe"),
    ("sparse member", archive([(of_type(tarfile.GNUTYPE_SPARSE), b"")], tarfile.GNU_FORMAT), "x.png is a sparse file"),
    ("sparse member of pax", pax(record("GNU.sparse.realsize", "9999999999")), "a sparse file"),
    ("long link", archive([(of_type(tarfile.SYMTYPE, linkname="a" * 200), b"")], tarfile.GNU_FORMAT), "is a link"),
    ("unknown type", archive([(of_type(b"M"), b"")]), "x.png is no file (type b'M')"),
    ("duplicate member", archive([*sample(1), *sample(2), *sample(1)]), "0001.png: a second member of that name"),
    ("duplicate by another spelling", archive([*sample(1), ("./0001.png", b"")]), "0001.png: a second member of that name"),
    ("two images", archive([*sample(1), ("0001.jpg", b"")]), "0001.jpg: a second image beside 0001.png"),
    ("cut in a header", GOOD[: tar.BLOCK - 1], "truncated"),
    ("cut in a member", GOOD[: tar.BLOCK + 40], "truncated: 0001.png claims 77 bytes where the archive has 40"),
    ("cut after a member", GOOD[: 2 * tar.BLOCK], "after 0001.png: truncated: it ends at byte 1024"),
    ("more after its end", GOOD + GOOD, "after 0002.cls: more follows the end"),
    ("flipped byte in a header", GOOD[: 2 * tar.BLOCK] + b"\xff" + GOOD[2 * tar.BLOCK + 1 :], "after 0001.png: bad checksum"),
    ("size of 8 GiB", header(put(124, b"77777777777\0")), "truncated: x.png claims 8,589,934,591 bytes"),
    ("size of 2^70 bytes", header(put(124, b"\x80\0\0\x40" + bytes(8))), "x.png has a size of '1180591620717411303424'"),
    ("negative size", header(put(124, b"\xff" * 12)), "x.png has a size of '-1'"),
    ("size that is none", header(put(124, b"0x00000009 \0")), "invalid header"),
    ("directory with contents", header(put(156, b"5")), "x.png has a size of '77'"),
    ("pax header of 8 GiB", pax(b"", size=8**11 - 1), "an extended header of 8,589,934,591 bytes; at most 1,048,576"),
    ("pax header beyond the end", pax(b"", size=2**20), "truncated"),
    ("name of 2 GiB", pax(b"", tarfile.GNUTYPE_LONGNAME, 2**31), "an extended header of 2,147,483,648 bytes"),
    ("name of 5000 bytes", archive([("x" * 5000 + ".png", b"")]), "is longer than 4096 bytes"),
    ("pax size of 10^30", pax(record("size", "1" + "0" * 30)), "0001.png has a size of '1000000000000000000000000000000'"),
    ("pax size of 1 TB", pax(record("size", "1000000000000")), "truncated: 0001.png claims 1,000,000,000,000 bytes"),
    ("pax size below zero", pax(record("size", "-512")), "0001.png has a size of '-512'"),
    ("pax size in other digits", pax(record("size", "٣")), "0001.png has a size of"),
    ("pax length of 10^9", pax(b"1000000000 path=x.png\n"), "a damaged extended header"),
    ("pax length of 0", pax(b"0 path=x.png\n"), "a damaged extended header"),
    ("pax length of 10^5000", pax(b"9" * 5000), "a damaged extended header"),
    ("pax without value", pax(b"9 path.x\n"), "a damaged extended header"),
    ("pax of a million records", pax(b"6 a=b\n" * 174_000, times=6) + GOOD, "more follows the end"),
    ("pax that names another place", pax(record("path", "/etc/x.png")), "'/etc/x.png' leads out of the archive"),
    ("pax path for all members", pax(record("path", "x.png"), tarfile.XGLTYPE), "one name or size for all members"),
    ("name for terminals", archive([*sample(1), ("\x1b]0;owned\x07.png", b"")]), r"'\x1b]0;owned\x07.png' cannot be printed"),
    ("name of two lines", archive([("a\nb.png", b"")]), "cannot be printed"),
    ("name that is no UTF-8", header(put(0, b"\xff\xfe.png\0")), "cannot be printed"),
    ("name turned round", archive([("a\u202egnp.exe.png", b"")]), "cannot be printed"),
    ("name with a zero in it", pax(record("path", "a.png\0.txt")), "cannot be printed"),
    *[
        (f"class {text[:20]!r}", archive([*sample(1, 0), *sample(2), ("0002.cls", text)]), f"0002.cls: {message}")
        for text, message in [
            (b"", "a label is a whole number"),
            (b"cat", "a label is a whole number"),
            (b"-1", "a label is a whole number"),
            (b"1.0", "a label is a whole number"),
            (b"100000", "a label is a whole number from 0 to 99,999"),
            (b"9" * 19, "a label is"),
            (b"9" * 21, "21 bytes are more"),
            ("٣".encode(), "a label is a whole number"),
            (b"\xff", "a label is a whole number"),
            (b"1\0", "a label is a whole number"),
        ]
    ],
    *[
        (f"JSON {text[:20]!r}", archive([*sample(1, 0), *sample(2), ("0002.json", text)]), f"0002.json: {message}")
        for text, message in [
            (b"", "Expecting value"),
            (b"{", "Expecting property"),
            (b"\xff\xfe\xfd", "'utf-16-le' codec can't decode"),
            (b"[" * 100_000, "nested too deeply"),
            (b'{"label": "cat"}', "a label is"),
            (b'{"label": 1.5}', "a label is"),
            (b'{"label": true}', "a label is"),
            (b'{"label": -1}', "a label is"),
            (b'{"label": 1e999}', "a label is"),
            (b'{"label": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
            (b'{"label": null}', "a label is"),
            (b" " * (2**20 + 1), "1,048,577 bytes are more"),
        ]
    ],
    ("a label on some", archive([*sample(1, 0), *sample(2)]), "0002.png: no label, unlike what is before it"),
    ("a label on others", archive([*sample(1), *sample(2, 0)]), "0002.png: a label, unlike what is before it"),
]


@pytest.mark.parametrize("content, message", [row[1:] for row in HOSTILE_ARCHIVES], ids=[row[0] for row in HOSTILE_ARCHIVES])
def test_a_hostile_archive_is_refused_by_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with contained(tmp_path), pytest.raises(ValueError) as caught:
        WebDataset(str(path)).fit()
    said = str(caught.value)
    assert message in said and str(path) in said and said.isprintable()


def test_what_the_table_changes_is_sound_before(tmp_path: Path) -> None:
    """Each refusal is of what its name says, and not of how the table makes its archives."""
    for content in (GOOD, header(lambda block: None), pax(record("mtime", "1.5")), pax(record("comment", "x"), tarfile.XGLTYPE)):
        (tmp_path / "a.tar").write_bytes(content)
        WebDataset(str(tmp_path / "a.tar")).fit()
    (tmp_path / "a.tar").write_bytes(pax(record("path", "other.png")))
    assert WebDataset(str(tmp_path / "a.tar"), held_out=0).split("train").names == "other.png"


def test_a_label_beyond_the_classes_and_a_missing_one_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"000\.tar: 0002\.png: the label 2 is none of the 2 classes"):
        data_of(shards, classes=["a", "b"]).split("train")
    (tmp_path / "a.tar").write_bytes(archive(sample(1)))
    with pytest.raises(ValueError, match=r"a\.tar: 0001\.png: no label"):
        WebDataset(str(tmp_path / "a.tar"), classes=["a"]).split("train")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=r"a\.tar: (not a regular file|.*Is a directory)"):
        WebDataset(str(tmp_path / "a.tar")).split("train")


def test_a_hole_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(GOOD)
        file.truncate(2**40)
    with contained(tmp_path), pytest.raises(ValueError, match="more follows the end"):
        WebDataset(str(tmp_path / "a.tar")).fit()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=16)), max_size=4), st.integers(0, len(GOOD)))
def test_whatever_the_bytes_are_an_archive_is_read_rightly_or_refused(changes: list[tuple[int, bytes]], length: int) -> None:
    content = bytearray(GOOD)
    for at, data in changes:
        content[at : at + len(data)] = data
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.tar")
        path.write_bytes(content[:length])
        try:
            items = WebDataset(str(path), held_out=0, size=8).split("train")
        except ValueError as error:
            said, items = str(error), None
        if items is None:
            assert str(path) in said and said.isprintable()
            return
        for index, name in enumerate(items.names.split("\n")):
            with tarfile.open(path) as reader:
                expected = reader.extractfile(name)
                assert expected is not None
                _, at, size, _ = items.places[index].tolist()
                assert content[at + tar.BLOCK : at + tar.BLOCK + size] == expected.read()
            with contextlib.suppress(CorruptItem):
                assert items[index]["x"].isfinite().all()


# --- hostile members, and shards that change --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_hostile_images_are_corrupt_and_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(archive([(f"{index}/{name}", data) for index, (name, data) in enumerate(HOSTILE.items())]))
    items = WebDataset(str(path), held_out=0).split("train")
    assert len(items) == len(HOSTILE)
    for index, name in enumerate(HOSTILE):
        with contained(tmp_path), pytest.raises(CorruptItem, match=rf"^{path}: {index}/{name}: .+"):
            items[index]


def test_a_member_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(archive([("1.png", bytes(2**24 + 5000))]))
    with pytest.raises(CorruptItem, match=r"a\.tar: 1\.png: 16,782,216 bytes are more than 16,781,216"):
        WebDataset(str(tmp_path / "a.tar"), held_out=0, max_pixels=1000).split("train")[0]


def _in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(shard(range(20, 30)))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "replaced": (
        lambda path: path.with_suffix(".new").write_bytes(path.read_bytes()) and path.with_suffix(".new").replace(path),
        "has changed",
    ),
    "written over": (_in_place, "has changed"),
    "cut": (lambda path: os.truncate(path, 600), "has changed"),
    "grown": (lambda path: path.write_bytes(path.read_bytes() + bytes(512)), "has changed"),
    "gone": (Path.unlink, "No such file"),
    "a pipe": (lambda path: path.unlink() or os.mkfifo(path), "not a regular file"),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_after_its_headers_were_read(shards: Path, change: str) -> None:
    items = data_of(shards).split("train")
    act, message = CHANGES[change]
    act(shards / "001.tar")
    with pytest.raises(CorruptItem, match=rf"001\.tar: 0013\.png: .*{message}"):
        items[13]
    assert items[7]["label"] == 1  # of another shard


def test_an_object_that_is_replaced_is_noticed_at_once_by_its_headers_and_within_a_minute_by_its_store(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    system, url = fsspec.filesystem("memory"), f"{memory}/001.tar"
    items = data_of(memory).split("train")
    good = system.cat_file(url)
    system.pipe_file(url, shard(range(20, 30)))
    with pytest.raises(CorruptItem, match=rf"{url}: 0013\.png: .*has changed"):
        items[13]
    system.pipe_file(url, good[: 2 * tar.BLOCK])
    with pytest.raises(CorruptItem, match=rf"{url}: 0013\.png: .*gave 0 bytes"):
        items[13]
    system.pipe_file(url, good)
    assert numbers({"x": items[13]["x"][None]}) == [13]
    now = tar.time.monotonic()
    monkeypatch.setattr(tar.time, "monotonic", lambda: now + 61)
    with pytest.raises(CorruptItem, match=rf"{url}: 0013\.png: .*has changed"):
        items[13]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_training_goes_on_past_hostile_images(shards: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    content = []
    for index, (name, data) in enumerate(HOSTILE.items()):
        content += [(f"{index}/{name}", data), (f"{index}/{name.split('.')[0]}.cls", b"0")]
    (shards / "001.tar").write_bytes(archive(content))
    items = data_of(shards).split("train")
    loader = Loader(items, 0, 10, workers=workers)
    with caplog.at_level(logging.WARNING):
        batches = [batch for step in itertools.islice(loader, len(items) // 10 + 1) for batch in step]
    assert len(loader.corrupt) == len(HOSTILE) == len(items) - 30
    assert all(batch["x"].shape == (10, 3, 8, 8) for batch in batches)
    assert "/warned_bomb.png: 10000 x 10000 is more than 50000000 pixels" in caplog.text


def test_json_of_a_run_names_the_shards(shards: Path) -> None:
    data = data_of(shards)
    data.fit()
    assert json.loads(json.dumps(to_dict(data)))["shards"] == [f"{shards}/{{000..003}}.tar"]
