"""Images of several proportions: the shapes, which image gets which, and an order in which each step is of one shape."""

from __future__ import annotations

import itertools
import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from gentrain.config import ConfigError, Document, build
from gentrain.data.base import BucketItems, CorruptItem, Data
from gentrain.data.buckets import Buckets, nearest
from gentrain.data.image_folder import ImageFolder
from gentrain.data.loader import BucketOrder, Loader
from gentrain.training.activations import measure
from gentrain.training.loop import train
from gentrain.training.roles import build_network
from gentrain.training.run import save_config
from gentrain.training.world import World
from tests.distributed.cases import difference, records, run_of, state_of
from tests.models.pipelines import dit as dit_pipeline
from tests.models.pipelines import stable_diffusion, stable_diffusion_3

ALONE = World(0, 1, torch.device("cpu"))
SIZES = [(24, 24), (16, 36), (36, 16), (30, 20)]  # width, height; the last is nearest to the square


# --- shapes ---


def test_all_shapes_have_as_many_tokens_as_the_square() -> None:
    assert Buckets(step=16).shapes(576) == [(576, 576), (288, 1152), (384, 864), (432, 768), (768, 432), (864, 384), (1152, 288)]
    for size, step, ratio in ((960, 16, 4.0), (480, 16, 2.5), (24, 4, 4.0)):
        shapes = Buckets(step=step, ratio=ratio).shapes(size)
        assert shapes[0] == (size, size) and len(set(shapes)) == len(shapes) > 2
        for height, width in shapes:
            assert height * width == size**2 and height % step == width % step == 0 and max(height, width) <= ratio * min(height, width)
            assert (width, height) in shapes


def test_a_tolerance_gives_the_usual_shapes_with_no_more_tokens() -> None:
    shapes = Buckets(step=64, tolerance=0.04).shapes(1024)
    wide = [(960, 1088), (896, 1152), (832, 1216), (768, 1344), (704, 1472), (640, 1600), (576, 1792), (512, 2048)]
    assert set(shapes) == {(1024, 1024), *wide, *((width, height) for height, width in wide)}


def test_sizes_without_other_shapes_are_told_with_those_that_have_some() -> None:
    with pytest.raises(ConfigError, match=r"buckets.tolerance: no two multiples of 64 .* 448\*\*2 .* such as 384 or 512"):
        ImageFolder("x", size=448, buckets=Buckets())
    with pytest.raises(ConfigError, match=r"buckets.step: the size of 500 pixels is no multiple of 64"):
        ImageFolder("x", size=500, buckets=Buckets())
    assert Buckets().shapes(384) and Buckets().shapes(512)


def test_an_image_gets_the_shape_of_the_nearest_proportions() -> None:
    shapes = [(24, 24), (16, 36), (36, 16)]
    assert [nearest(height, width, shapes) for height, width in ((10, 10), (100, 148), (100, 152), (1, 9), (9, 1), (148, 100))] == [
        0, 0, 1, 1, 2, 0,
    ]  # fmt: skip
    assert math.isclose(math.sqrt(36 / 16), 1.5)  # where one shape ends and the next begins


# --- the order ---


class Items:
    """Items [1, h, w] whose values are their numbers; some are corrupt."""

    def __init__(self, buckets: list[int], corrupt: tuple[int, ...] = ()):
        self.buckets, self._corrupt = torch.tensor(buckets), corrupt

    def __len__(self) -> int:
        return len(self.buckets)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index in self._corrupt:
            raise CorruptItem(f"image {index} is broken")
        return {"x": torch.full((1, 2 + int(self.buckets[index]), 3), float(index)), "label": torch.tensor(0)}


MANY = [0] * 10 + [1] * 23 + [2] * 3 + [4] * 1 + [1] * 3  # 40 items; bucket 3 is empty


@pytest.mark.parametrize("batch", [1, 4, 6, 64])
def test_each_item_comes_as_often_as_any_other(batch: int) -> None:
    order = BucketOrder(5, torch.tensor(MANY), batch)
    items = order(torch.arange(40 * batch))  # each bucket is passed a whole number of times
    assert torch.bincount(items, minlength=40).tolist() == [batch] * 40
    buckets = torch.tensor(MANY)[items].reshape(-1, batch)
    assert (buckets == buckets[:, :1]).all()


def test_no_item_comes_twice_in_a_pass_and_buckets_come_in_proportion() -> None:
    order = BucketOrder(5, torch.tensor(MANY), 4)
    items = order(torch.arange(4000))
    buckets = torch.tensor(MANY)[items]
    for bucket, count in Counter(MANY).items():
        stream = items[buckets == bucket]
        for first in range(0, len(stream) - count, count):
            assert len(set(stream[first : first + count].tolist())) == count
        for part in buckets.reshape(10, 400):  # of any stretch as of all
            assert abs(int((part == bucket).sum()) - 400 * count / 40) <= 8
    steps = buckets[::4]
    assert len(set(zip(steps[:20].tolist(), steps[20:40].tolist()))) > 4  # no fixed succession


@pytest.mark.parametrize("ranks, micro_batches, workers", [(1, 1, 0), (2, 1, 0), (2, 2, 2), (4, 1, 0), (3, 2, 0)])
def test_the_stream_and_the_shape_of_a_step_do_not_depend_on_ranks(ranks: int, micro_batches: int, workers: int) -> None:
    assert isinstance(Items(MANY), BucketItems)
    loaders = [iter(Loader(Items(MANY), 3, 12, rank, ranks, micro_batches, workers=workers)) for rank in range(ranks)]
    whole = iter(Loader(Items(MANY), 3, 12))
    for _ in range(9):
        reference, parts = next(whole)[0], [next(loader) for loader in loaders]
        shapes = {batch["x"].shape[1:] for part in parts for batch in part}
        assert len(shapes) == 1
        rows = {int(i): float(x) for part in parts for batch in part for i, x in zip(batch["index"], batch["x"][:, 0, 0, 0], strict=True)}
        assert rows == {int(i): float(x) for i, x in zip(reference["index"], reference["x"][:, 0, 0, 0], strict=True)}


def test_a_run_goes_on_at_any_step() -> None:
    whole, later = iter(Loader(Items(MANY), 3, 12)), iter(Loader(Items(MANY), 3, 12, start=7 * 12))
    for _ in range(7):
        next(whole)
    for _ in range(30):
        assert torch.equal(next(whole)[0]["x"], next(later)[0]["x"])


def test_a_corrupt_item_is_replaced_by_one_of_its_shape() -> None:
    seen = iter(Loader(Items(MANY, corrupt=(0, 1, 12)), 3, 4))
    batches = [next(seen)[0]["x"] for _ in range(60)]
    assert not {0.0, 1.0, 12.0} & {float(value) for batch in batches for value in batch[:, 0, 0, 0]}
    loader = iter(Loader(Items(MANY, corrupt=(33, 34, 35)), 3, 4))
    with pytest.raises(RuntimeError, match=r"none of 3 items of one shape can be read; .*image 3[345] is broken"):
        list(itertools.islice(loader, 60))


# --- images ---


def pictures(root: Path, count: int = 24, form: str = "png") -> Path:
    """Each of a colour of its own, with the sizes of SIZES in turn, and a caption."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        file = root / f"{number:02}.{form}"
        Image.new("RGB", SIZES[number % 4], (number * 10, 0, 255 - number)).save(file)
        file.with_suffix(".txt").write_text(("red", "a dog")[number % 2])
    return root


def folder(root: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": "image_folder", "path": str(pictures(root)), "size": 24, "held_out": 0.2, "captioned": True, "buckets": {"step": 4}, **more
    }  # fmt: skip


def test_images_are_cropped_to_their_shape_and_held_out_ones_to_the_square(tmp_path: Path) -> None:
    data: Any = build(Data, Document(folder(tmp_path), "test"))  # type: ignore[type-abstract]
    assert data.shape == (3, 24, 24) and data.shapes[0] == (3, 24, 24) and (3, 16, 36) in data.shapes
    items = pickle.loads(pickle.dumps(data.split("train")))
    for index, name in enumerate(items.files):
        width, height = SIZES[int(name[:2]) % 4]
        expected = (3, 24, 24) if (width, height) == (24, 24) else (3, *data._shapes[int(items.buckets[index])])
        assert items[index]["x"].shape == expected
        if (width, height) in ((16, 36), (36, 16)):
            assert expected == (3, height, width)
    held_out = data.split("held_out")
    assert not isinstance(held_out, BucketItems) and {held_out[i]["x"].shape for i in range(len(held_out))} == {(3, 24, 24)}


def test_the_cameras_orientation_counts(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    Image.new("RGB", (36, 16)).save(tmp_path / "a" / "x.jpg", exif=exif)
    items: Any = ImageFolder(str(tmp_path), size=24, held_out=0, buckets=Buckets(step=4)).split("train")
    assert items[0]["x"].shape == (3, 36, 16)


def test_an_image_that_cannot_be_read_is_corrupt(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "00.png").write_bytes(b"no image")
    items: Any = ImageFolder(str(tmp_path), size=24, held_out=0, captioned=True, buckets=Buckets(step=4)).split("train")
    assert int(items.buckets[0]) == 0
    with pytest.raises(CorruptItem, match=r"00\.png"):
        items[0]


# --- runs ---


def _settings(root: Path, output: str, **more: Any) -> dict[str, Any]:
    if not (root / "pipeline").exists():
        stable_diffusion(root / "pipeline")
    return {
        "method": {"name": "diffusion", "label_dropout": 0.5},
        "data": folder(root / "images"),
        "model": {"name": "pretrained", "directory": str(root / "pipeline")},
        "engine": "torch",
        "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.0},
        "training": {"samples": 24, "batch_size": 4, "micro_batches": 2, "log_every": 4, "ema_half_life": 4, "ema_warmup": 0},
        "output": str(root / output),
        **more,
    }  # fmt: skip


def _trained(settings: dict[str, Any], stop_at: int | None = None) -> Path:
    asked = iter(range(1000))
    run = run_of(settings)
    save_config(run)
    train(run, ALONE, lambda: next(asked) == stop_at)
    return run.directory


def test_a_pipeline_learns_from_images_of_several_shapes_and_resumes(tmp_path: Path) -> None:
    whole = _trained(_settings(tmp_path, "whole"))
    halves = _settings(tmp_path, "halves")
    _trained(halves, stop_at=3)
    _trained(halves)
    assert records(whole) == records(tmp_path / "halves") and difference(state_of(whole), state_of(tmp_path / "halves")) == 0
    assert all(math.isfinite(line["loss/model"]) for line in records(whole))
    found = measure(run_of(_settings(tmp_path, "plan")), 2)
    assert found.activations["model"].saved > 0 and found.activations["model"].assumed == ""


def test_a_cache_holds_each_shape_and_training_from_it_is_training_without(tmp_path: Path) -> None:
    from gentrain.recipes.encode import Encode

    settings = _settings(tmp_path, "whole")
    model: Any = {"model": settings["model"], "data": settings["data"], "shard": 4}
    build(Encode, Document(model, "test")).execute(tmp_path / "cache")
    cached = settings | {"output": str(tmp_path / "cached"), "data": {"name": "latents", "directory": str(tmp_path / "cache")}}
    run = run_of(cached)
    assert run.data.shape == (4, 12, 12) and set(run.data.shapes) > {(4, 12, 12), (4, 8, 18), (4, 18, 8)}
    plain, items = run_of(settings).data.split("train"), run.data.split("train")
    assert isinstance(items, BucketItems) and sorted(items.buckets.tolist()) == sorted(plain.buckets.tolist())  # type: ignore[attr-defined]
    assert items.buckets.tolist() == sorted(items.buckets.tolist()) and not isinstance(run.data.split("held_out"), BucketItems)
    _trained(cached)
    losses = [line["loss/model"] for line in records(tmp_path / "cached")]
    assert len(losses) == 6 and all(map(math.isfinite, losses))


def test_networks_for_one_shape_are_refused(tmp_path: Path) -> None:
    settings = _settings(tmp_path, "run")
    for model, message in (
        ({"name": "dit"}, r"model: dit is for samples of one shape; leave out `buckets`"),
        (
            {"name": "unet", "channels": [8] * 4, "attention_head_dim": 8, "norm_groups": 4},
            r"model: images of 12x48 pixels are not divisible by 8",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            build_network(run_of(settings | {"model": model}), "model")
    classed = folder(tmp_path / "classed" / "a") | {"path": str(tmp_path / "classed"), "captioned": False}
    of_classes = settings | {"model": {"name": "pretrained", "directory": str(dit_pipeline(tmp_path / "dit"))}, "data": classed}
    with pytest.raises(ConfigError, match=r"model: DiTTransformer2DModel is for square images"):
        build_network(run_of(of_classes), "model")
    flow = settings | {"method": "flow_matching"}
    three = flow | {"model": {"name": "pretrained", "directory": str(stable_diffusion_3(tmp_path / "three"))}}
    config = tmp_path / "three" / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"pos_embed_max_size": 96', '"pos_embed_max_size": 16'))
    with pytest.raises(ConfigError, match=r"its positions end at 32 pixels along a side, and images have 48"):
        build_network(run_of(three | {"data": settings["data"] | {"size": 24, "buckets": {"step": 12}}}), "model")


def test_data_sets_made_of_others_refuse_them(tmp_path: Path) -> None:
    inner = folder(tmp_path)
    for outer in ({"name": "resampled", "data": inner}, {"name": "combined", "parts": [{"data": inner}, {"data": inner}]}):
        data: Any = build(Data, Document(outer, "test"))  # type: ignore[type-abstract]
        with pytest.raises(ValueError, match="items of several shapes cannot be chosen from, marked or mixed; leave out `buckets`"):
            data.split("train")
