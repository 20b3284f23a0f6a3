import itertools
import json
import logging
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from gentrain.config import ConfigError, Document, build, to_dict
from gentrain.data.base import BatchItems, CorruptItem, Data
from gentrain.data.image_folder import ImageFolder
from gentrain.data.loader import Loader
from tests.data.hostile_images import HOSTILE, scans, tiled


def save(path, colour=(255, 0, 0), size=(20, 12), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """30 images of two classes, each of a colour of its own."""
    for number in range(30):
        save(tmp_path / ("ant" if number % 2 else "bee/deep") / f"{number}.png", (number * 8, 0, 255))
    return tmp_path


def one(path, **options):
    """The only image of a folder."""
    return ImageFolder(str(path), held_out=0, **options).split("train")[0]["x"]


# --- what is found ----------------------------------------------------------------------------------------------------------------


def test_classes_and_labels_come_from_folders(folder):
    data = ImageFolder(str(folder), size=8)
    assert data.class_names == ["ant", "bee"] and data.shape == (3, 8, 8)
    for name in ("train", "held_out"):
        items = data.split(name)
        assert not isinstance(items, BatchItems)
        for item in map(pickle.loads(pickle.dumps(items)).__getitem__, range(len(items))):
            number = round(float(item["x"][0, 0, 0] + 1) * 127.5) // 8
            assert item["label"] == (0 if number % 2 else 1)
            assert item["x"].shape == (3, 8, 8) and item["x"].dtype == torch.float32 and item["label"].dtype == torch.int64


def test_what_a_run_has_recorded_stays_whatever_becomes_of_the_folder(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    data = ImageFolder(folder.name, size=8)
    data.fit()
    recorded = build(Data, Document(to_dict(data), "config.yaml"))
    monkeypatch.chdir("/")
    assert recorded.split("train").files == data.split("train").files
    (folder / "bee").rename(folder / "zebra")
    assert recorded.class_names == ["ant", "bee"] == data.class_names
    recorded = build(Data, Document(to_dict(data), "config.yaml"))
    with pytest.raises(ValueError, match=r"the folder 'zebra' below .* is none of the classes ant, bee; give it its former name"):
        recorded.split("train")
    shutil.rmtree(folder)
    assert recorded.class_names == ["ant", "bee"], "sampling and exporting need no images"


def test_new_files_move_no_old_ones(folder):
    def files(name):
        return set(ImageFolder(str(folder), held_out=0.3).split(name).files)

    train, held_out = files("train"), files("held_out")
    assert not train & held_out and len(train | held_out) == 30 and 3 <= len(held_out) <= 15
    for number in range(40):
        save(folder / "added" / f"{number}.png")
    save(folder / "ant" / "0.png")
    assert train < files("train") and held_out < files("held_out")


def test_the_split_is_fixed_for_ever(folder):
    """Wherever the folder lies and whenever it is read: else models trained before have seen what is now held out."""
    assert ImageFolder(str(folder), held_out=0.1).split("held_out").files == ["ant/23.png", "ant/27.png"]


def test_held_out_share(tmp_path):
    (tmp_path / "a").mkdir()
    for number in range(2000):
        (tmp_path / "a" / f"{number}.png").touch()
    data = ImageFolder(str(tmp_path), held_out=0.2)
    assert abs(len(data.split("held_out")) - 400) < 5 * (2000 * 0.2 * 0.8) ** 0.5
    assert len(data.split("train")) + len(data.split("held_out")) == 2000


def test_other_files_and_images_without_class_are_left_out(folder, caplog):
    (folder / "ant" / "notes.txt").write_text("no image")
    save(folder / "cover.png")
    data = ImageFolder(str(folder), held_out=0)
    assert len(data.split("train")) == 30
    assert "1 images lie in no class folder" in caplog.text


def test_links_are_not_followed(folder, tmp_path_factory, caplog):
    outside = tmp_path_factory.mktemp("outside")
    save(outside / "secret" / "1.png")
    (folder / "ant" / "link.png").symlink_to(outside / "secret" / "1.png")
    (folder / "linked_class").symlink_to(outside / "secret")
    (folder / "ant" / "loop").symlink_to(folder)
    data = ImageFolder(str(folder), held_out=0)
    assert len(data.split("train")) == 30 and data.class_names == ["ant", "bee"]
    assert "3 links were not followed" in caplog.text
    at_root = tmp_path_factory.mktemp("root") / "link"
    at_root.symlink_to(folder)
    assert len(ImageFolder(str(at_root), held_out=0).split("train")) == 30  # the user named this one


def test_a_pipe_is_not_opened(folder):
    os.mkfifo(folder / "ant" / "pipe.png")
    assert len(ImageFolder(str(folder), held_out=0).split("train")) == 30


def test_a_missing_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"no such folder: .*/absent"):
        ImageFolder(str(tmp_path / "absent")).split("train")
    with pytest.raises(ValueError, match=r"no images below .*; looked for .*/CLASS/\*\*/\*\(\.png"):
        ImageFolder(str(tmp_path)).split("train")


def test_an_empty_split_says_how_to_mend_it(folder):
    with pytest.raises(ValueError, match=r"none of the 30 images .* held_out split; change held_out \(0"):
        ImageFolder(str(folder), held_out=0).split("held_out")


# --- how an image is read ---------------------------------------------------------------------------------------------------------


def test_values_are_exact(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    assert one(tmp_path, size=16).equal(torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)
    grey = one(tmp_path, size=16, colours="grey")
    luma = (torch.from_numpy(pixels).double() @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)) / 127.5 - 1
    assert grey.shape == (1, 16, 16) and (grey[0] - luma).abs().max() <= 1 / 127.5


@pytest.mark.parametrize("size", [(90, 30), (30, 90)], ids=["wide", "tall"])
def test_the_centre_is_cropped(tmp_path, size):
    """Thirds in red, green and blue: only the middle one stays."""
    image = Image.new("RGB", size)
    for third, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        step = (third * 30, 0) if size[0] > size[1] else (0, third * 30)
        image.paste(colour, (*step, step[0] + 30, step[1] + 30))
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "1.png")
    x = one(tmp_path, size=10)
    assert (x[:, 2:8, 2:8] - torch.tensor([-1.0, 1, -1])[:, None, None]).abs().max() < 0.02


def test_orientation_transparency_and_palette(tmp_path):
    turned = Image.new("RGB", (40, 40), "black")
    turned.paste("white", (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: the upper half belongs on the right
    for kind in ("turned", "clear", "palette"):
        (tmp_path / kind / "c").mkdir(parents=True)
    turned.save(tmp_path / "turned/c/1.png", exif=exif)
    x = one(tmp_path / "turned", size=8)
    assert (x[:, :, :3] < -0.9).all() and (x[:, :, 5:] > 0.9).all()
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(tmp_path / "clear/c/1.png")
    assert (one(tmp_path / "clear", size=8) == 1).all()
    Image.new("RGB", (9, 9), (0, 0, 255)).quantize(4).save(tmp_path / "palette/c/1.gif")
    assert one(tmp_path / "palette", size=8).equal(torch.tensor([-1.0, -1, 1])[:, None, None].expand(3, 8, 8))


def test_a_large_jpeg_is_read_in_reduced_detail_but_rightly(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 1200, dtype=np.uint8)[:, None, None], (1, 1200, 3))
    (tmp_path / "a").mkdir()
    Image.fromarray(ramp).save(tmp_path / "a" / "1.jpg", quality=95)
    expected = (torch.arange(32) + 0.5) / 32 * 2 - 1
    assert (one(tmp_path, size=32) - expected[None, :, None]).abs().max() < 0.03
    stripes = np.tile(np.repeat([0, 255], 8)[None].repeat(16, 0).reshape(-1, 1, 1).astype(np.uint8), (1, 256, 3))
    Image.fromarray(stripes).save(tmp_path / "a" / "1.jpg", quality=95)
    assert one(tmp_path, size=64).abs().mean() > 0.9  # still black and white


# --- hostile images ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images_are_corrupt_and_named(tmp_path, name):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(HOSTILE[name])
    with pytest.raises(CorruptItem, match=rf"/a/{name}: .+"):
        one(tmp_path)


def test_what_unpacks_to_more_than_its_pixels_is_told_before_it_does(tmp_path):
    """The scans, in 220 KB, would take 13 s; the tile, in 151 bytes, 900 MB."""
    (tmp_path / "a").mkdir()
    for name, content, said in (
        ("1.jpg", scans(400, (7000, 7000)), "405 scans are more than 100"),
        ("1.tiff", tiled(30_000), "a tile of 900,000,000 pixels is more than 16,777,216"),
    ):
        (tmp_path / "a" / name).write_bytes(content)
        with pytest.raises(CorruptItem, match=said):
            one(tmp_path)
        (tmp_path / "a" / name).unlink()


def test_many_scans_behind_the_end_of_an_image_and_small_tiles_do_no_harm(tmp_path):
    """Telephones put a film behind a picture."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(scans(3) + b"\xff\xda\0\2" * 20_000)
    (tmp_path / "a" / "2.tiff").write_bytes(tiled(16))
    items = ImageFolder(str(tmp_path), held_out=0, size=8).split("train")
    assert [float(items[index]["x"].std()) < 0.01 for index in range(2)] == [True, True]


def test_limits_are_configurable_and_named(tmp_path):
    save(tmp_path / "a" / "1.png", size=(50, 40))
    with pytest.raises(CorruptItem, match="50 x 40 is more than 1999 pixels"):
        one(tmp_path, max_pixels=1999)
    assert one(tmp_path, max_pixels=2000).shape == (3, 64, 64)


def test_a_vanished_file_is_corrupt(folder):
    items = ImageFolder(str(folder), held_out=0).split("train")
    (folder / items.files[3]).unlink()
    with pytest.raises(CorruptItem, match="No such file"):
        items[3]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_training_goes_on_past_hostile_images(folder, workers, caplog):
    for name, content in HOSTILE.items():
        (folder / "bee" / name).write_bytes(content)
    items = ImageFolder(str(folder), held_out=0, size=8).split("train")
    loader = Loader(items, 0, 10, workers=workers)
    with caplog.at_level(logging.WARNING):
        batches = [batch for step in itertools.islice(loader, len(items) // 10 + 1) for batch in step]
    assert len(loader.corrupt) == len(HOSTILE) == len(items) - 30
    assert all(sum(f"bee/{name}: " in record.message for record in caplog.records) == 1 for name in HOSTILE)
    assert all(batch["x"].shape == (10, 3, 8, 8) for batch in batches)


# --- captions -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def captioned(tmp_path):
    """Six images, two of them in the folder itself; three captions lie beside, three in files of metadata."""
    for number, (file, text) in enumerate(
        {"a.png": "a red rose", "b.jpg": "", "deep/c.png": "two\n  dogs ", "deep/d.png": None, "deep/er/e.png": None, "f.png": None}.items()
    ):
        save(tmp_path / file, (number * 40, 0, 0))
        if text is not None:
            (tmp_path / file).with_suffix(".txt").write_text(text, encoding="utf-8")
    lines = [{"file_name": "deep/d.png", "text": "a cat", "other": 1}, {"file_name": "./f.png", "text": "a red rose"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    (tmp_path / "deep/metadata.jsonl").write_text(json.dumps({"file_name": "er/e.png", "text": "été"}), encoding="utf-8")
    return tmp_path


def captions_of(data):
    items = data.split("train")
    return {name: data.captions[int(items[index]["caption"])] for index, name in enumerate(items.files)}


def test_captions_lie_beside_images_or_in_metadata(captioned):
    data = ImageFolder(str(captioned), size=8, held_out=0, captioned=True)
    expected = {
        "a.png": "a red rose",
        "b.jpg": "",
        "deep/c.png": "two dogs",
        "deep/d.png": "a cat",
        "deep/er/e.png": "été",
        "f.png": "a red rose",
    }
    assert captions_of(data) == expected
    assert data.captions == ["", "a cat", "a red rose", "two dogs", "été"] and data.class_names == ()
    item = pickle.loads(pickle.dumps(data.split("train")))[0]
    assert item["label"] == -1 and item["caption"].dtype == torch.int64 and item["x"].shape == (3, 8, 8)
    data.fit()
    recorded = build(Data, Document(to_dict(data), "config.yaml"))
    assert captions_of(recorded) == expected
    assert "caption" not in ImageFolder(str(captioned), size=8, held_out=0).split("train")[0]


def test_captions_belong_to_their_images_in_both_splits(tmp_path):
    for number in range(40):
        save(tmp_path / f"{number}.png", (number * 6, 0, 0))
        (tmp_path / f"{number}.txt").write_text(f"number {number}")
    data = ImageFolder(str(tmp_path), size=8, captioned=True, held_out=0.3)
    for name in ("train", "held_out"):
        items = data.split(name)
        for index in range(len(items)):
            number = round(float(items[index]["x"][0, 0, 0] + 1) * 127.5) // 6
            assert data.captions[int(items[index]["caption"])] == f"number {number}"
    assert len(data.captions) == 40


def test_another_field_may_hold_the_caption(captioned):
    for folder in (captioned, captioned / "deep"):
        file = folder / "metadata.jsonl"
        file.write_text(file.read_text().replace('"text"', '"caption"'))
    assert captions_of(ImageFolder(str(captioned), size=8, held_out=0, captioned=True, field="caption"))["deep/d.png"] == "a cat"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.txt", None, r"a\.png has no caption; write a\.txt beside it"),
        ("f.txt", "another", r"f\.png has one caption beside it and another one in metadata\.jsonl"),
        ("a.txt", "é".encode("latin-1"), r"a\.txt: .*utf-8.*; write a caption in UTF-8"),
        ("a.txt", "\x1b[2J", r"a\.txt: holds characters that cannot be printed"),
        ("a.txt", "x" * 70_000, r"a\.txt: 70,000 bytes are more than 65,536"),
        ("metadata.jsonl", '{"file_name": "f.png"}', r"line 1 of .*metadata\.jsonl: no object with file_name and 'text'; mend it"),
        ("metadata.jsonl", "\n[1, 2]", r"line 2 of .*metadata\.jsonl: no object; mend it"),
        ("metadata.jsonl", '{"text": "x", "file_name": 3}', r"line 1 of .*: no object with file_name"),
        ("metadata.jsonl", '{"file_name": "f.png", "text": 1}', r"line 1 of .*: 'text' is no text"),
        ("metadata.jsonl", "{" * 10_000, r"line 1 of .*metadata\.jsonl: "),
        ("deep/metadata.jsonl", '{"file_name": "../f.png", "text": "x"}', r"f\.png has two captions in files metadata\.jsonl"),
    ],
)
def test_captions_that_cannot_be_meant_are_told(captioned, file, content, message):
    path = captioned / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        _ = ImageFolder(str(captioned), size=8, captioned=True).captions


def test_a_caption_that_is_a_link_or_a_pipe_is_not_followed(captioned):
    (captioned / "a.txt").unlink()
    (captioned / "a.txt").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match=r"a\.txt: "):
        _ = ImageFolder(str(captioned), size=8, captioned=True).captions
    (captioned / "a.txt").unlink()
    os.mkfifo(captioned / "a.txt")
    with pytest.raises(ValueError, match=r"a\.txt: not a regular file"):
        _ = ImageFolder(str(captioned), size=8, captioned=True).captions


def test_captioned_images_have_no_classes(captioned):
    with pytest.raises(ConfigError, match="classes: captioned images have no classes"):
        ImageFolder(str(captioned), captioned=True, classes=["a"])
