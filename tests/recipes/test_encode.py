"""A cache of latents and texts: what is in it, what is done again, what is refused, and that training from it is training without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gentrain.config import ConfigError, Document, build, to_dict
from gentrain.data.base import CorruptItem, Data, EmptySplit
from gentrain.data.latents import MANIFEST, Latents
from gentrain.models.pretrained import Pretrained
from gentrain.noise import Noise
from gentrain.recipes.base import load_recipe, run_recipe
from gentrain.recipes.encode import Encode
from gentrain.training.batches import encoded
from gentrain.training.loop import train
from gentrain.training.roles import build_network
from gentrain.training.run import RunConfig
from gentrain.training.settings import changed_keys
from gentrain.training.world import World
from tests.distributed.cases import difference, run_of, state_of
from tests.methods.captioned import CaptionedPatches
from tests.models.pipelines import dit, images, stable_diffusion

SHARD = 8  # rows of a file: 28 pictures to learn from make four


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("pipelines") / "sd")


@pytest.fixture(scope="module")
def cache(pipeline: Path) -> Path:
    encode(pipeline, pipeline.parent / "cache")
    return pipeline.parent / "cache"


def encode(pipeline: Path, directory: Path, **model: Any) -> None:
    Encode(Pretrained(str(pipeline), **model), CaptionedPatches(), SHARD).execute(directory)


def run_settings(pipeline: Path, data: Any, **more: Any) -> dict[str, Any]:
    return {
        "method": {"name": "diffusion", "label_dropout": 0.3}, "data": data, "model": {"name": "pretrained", "directory": str(pipeline)},
        "engine": "torch", "optimizer": {"name": "sgd", "lr": 0.01}, "training": {"samples": 24, "batch_size": 6, "log_every": 6}, **more,
    }  # fmt: skip


def rows(run: RunConfig, split: str, indices: Tensor) -> dict[str, Tensor]:
    batch = run.data.split(split).batch(indices) | {"index": torch.arange(len(indices))}  # type: ignore[attr-defined]
    return encoded(batch, run.data, run.codec(), 3, torch.device("cpu"))


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_batch_from_the_cache_is_the_one_that_encoding_gives(pipeline: Path, cache: Path, split: str) -> None:
    """To the last bit: the draw of the posterior, the texts, the null rows; in any order, over the bounds of the files."""
    plain, cached = (run_of(run_settings(pipeline, data)) for data in ("captioned_patches", {"name": "latents", "directory": str(cache)}))
    assert len(plain.data.split(split)) == len(cached.data.split(split))
    count = len(plain.data.split(split))
    indices = torch.tensor([0, count - 1, min(SHARD, count - 1), SHARD - 1, 3, 3])
    expected, found = rows(plain, split, indices), rows(cached, split, indices)
    assert set(expected) == set(found) - {"deviation"}
    for key, value in expected.items():
        # the pipeline encodes a prompt among others: sums of another order
        torch.testing.assert_close(
            found[key], value, rtol=1e-5, atol=1e-5 if key != "condition/prompt" else 1e-4, msg=lambda m, key=key: f"{key}: {m}"
        )
    assert not torch.equal(found["x"][4], found["x"][5])  # of one image, of two samples
    assert cached.data.captions == plain.data.captions and cached.data.licence == "made up"
    assert cached.codec().shape == plain.codec().shape == cached.data.shape and list(cached.codec().names) == list(plain.codec().names)


def test_training_from_the_cache_is_training_without_it_and_draws_images(pipeline: Path, cache: Path, tmp_path: Path) -> None:
    for name, data in (("plain", "captioned_patches"), ("cached", {"name": "latents", "directory": str(cache)})):
        run = run_of(run_settings(pipeline, data, output=str(tmp_path / name)))
        train(run, World(0, 1, torch.device("cpu")), lambda: False, ())
    assert difference(state_of(tmp_path / "plain"), state_of(tmp_path / "cached")) < 1e-4
    codec = run.codec()
    assert codec.decode(torch.zeros(2, *codec.shape)).shape == (2, *codec.decoded_shape) == (2, 3, 6, 6)
    assert codec.condition(torch.tensor([0]), ["a prompt of its own"]) is not None


def test_what_judges_decoded_pictures_is_built_for_them(pipeline: Path, cache: Path) -> None:
    towers = {"name": "towers", "channels": [8], "norm_groups": 2}
    method = {"name": "reward_guided_lcd", "reward": {"name": "towers", "model": towers}}
    for data in (Latents(str(cache)), CaptionedPatches()):
        settings = run_settings(pipeline, to_dict(data), method=method)
        judge: Any = build_network(run_of(settings | {"roles": {"towers": {"weights": "runs/towers"}}}), "towers")
        assert judge.image(torch.zeros(2, 3, 6, 6)).shape == (2, 128)


def test_rewards_of_images_follow_what_draws_latents(pipeline: Path, cache: Path) -> None:
    """Of 4 channels each: they are decoded before a reward sees them."""
    method = {"name": "draft", "reward": {"name": "brightness"}, "sampler": {"name": "ddim", "steps": 2}}
    settings = run_settings(pipeline, {"name": "latents", "directory": str(cache)}, method=method)
    run = run_of(settings | {"roles": {"model": {"weights": "runs/model"}}})
    assert run.data.shape[0] == 4


def test_finished_files_are_kept_and_others_are_written_again(pipeline: Path, cache: Path, tmp_path: Path) -> None:
    encode(pipeline, tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert [name for name in files if name.startswith("train")] == [f"train-0000{n}.safetensors" for n in range(4)]
    assert sum(name.startswith("held_out") for name in files) == 1 and sum(name.startswith("texts") for name in files) == 5
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    (tmp_path / MANIFEST).unlink()
    (tmp_path / "train-00002.safetensors").unlink()
    (tmp_path / "texts-00001.safetensors").write_bytes(b"torn")
    encode(pipeline, tmp_path)
    again = {path.name for path in tmp_path.glob("*.safetensors") if path.stat().st_mtime_ns != times[path.name]}
    assert again == {"train-00002.safetensors", "texts-00001.safetensors"}
    assert json.loads((tmp_path / MANIFEST).read_text()) == json.loads((cache / MANIFEST).read_text())


def test_other_weights_or_another_template_are_encoded_anew_and_refused_in_training(pipeline: Path, cache: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    encode(pipeline, tmp_path / "cache")
    before = load_file(tmp_path / "cache" / "train-00000.safetensors")
    other = stable_diffusion(tmp_path / "other")
    vae = AutoencoderKL.from_pretrained(other / "vae")
    vae.encoder.conv_in.weight.data.mul_(1.01)
    vae.save_pretrained(other / "vae")
    data = {"name": "latents", "directory": str(tmp_path / "cache")}
    with pytest.raises(ConfigError, match=r"model: the latents in .* were encoded by another autoencoder, text encoder or template"):
        run_of(run_settings(other, data)).codec()
    settings = run_settings(pipeline, data)
    for change in ({"prompt": "a {}"}, {"variant": "fp16"}):
        with pytest.raises(ConfigError, match="encoded by another"):
            run_of(settings | {"model": settings["model"] | change}).codec()
    encode(other, tmp_path / "cache")  # nothing of the old ones is taken for its own
    after = load_file(tmp_path / "cache" / "train-00000.safetensors")
    assert not torch.equal(before["x"], after["x"])
    assert run_of(run_settings(other, data)).codec().shape == (4, 3, 3)


def test_images_that_are_prepared_otherwise_are_encoded_anew(tmp_path: Path) -> None:
    directory, data = dit(tmp_path / "dit"), images(tmp_path / "images") | {"held_out": 0.5}
    found = []
    for more in ({}, {"colours": "rgb"}, {"size": 32}):
        stage = build(Encode, Document({"model": {"name": "pretrained", "directory": str(directory)}, "data": data | more}, "stage"))
        stage.execute(tmp_path / "cache")
        found.append([load_file(tmp_path / "cache" / "train-00000.safetensors")[key] for key in ("x", "deviation")])
    assert all(torch.equal(*each) for each in zip(found[0], found[1]))  # said or left out, it is the same
    assert found[0][0].shape[2:] == (8, 8) and found[2][0].shape[2:] == (16, 16)


def test_a_run_refuses_a_cache_that_was_written_anew(pipeline: Path, tmp_path: Path) -> None:
    encode(pipeline, tmp_path)
    data = Latents(str(tmp_path))
    data.fit()
    again = build(Latents, Document(to_dict(data), "run"))
    again.fit()  # the same
    encode(pipeline, tmp_path, prompt="my {}")
    with pytest.raises(ValueError, match="not those that the run began with"):
        build(Latents, Document(to_dict(data), "run")).fit()


def test_damage_is_told(pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.directory: .*manifest\.json cannot be read .*make latents with a stage `encode`"):
        _ = Latents(str(tmp_path / "nowhere")).shape
    encode(pipeline, tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    for other in ({"captions": manifest["captions"][1:]}, {"captions": []}, {"shape": [4, 9, 9]}):
        (tmp_path / MANIFEST).write_text(json.dumps(manifest | other))
        with pytest.raises(ValueError, match=r"manifest\.json in .* is not of the files beside it"):
            Latents(str(tmp_path)).split("train")
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    path = tmp_path / "train-00001.safetensors"
    content = load_file(path)
    save_file(content | {"x": content["x"] + 1}, path)
    with pytest.raises(ValueError, match=r"train-00001\.safetensors is not the file that was written; move .* and run its stage `encode`"):
        Latents(str(tmp_path)).split("train")
    path.unlink()
    with pytest.raises(ValueError, match=r"train-00001\.safetensors is missing or damaged"):
        Latents(str(tmp_path)).split("train")
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        _ = Latents(str(tmp_path)).captions


def test_what_cannot_be_encoded_is_refused(pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model: unet has no latents; name a pretrained network"):
        build(Encode, Document({"model": "unet", "data": "captioned_patches"}, "stage"))
    model = {"name": "pretrained", "directory": str(pipeline)}
    changing = {"name": "resampled", "balance": "classes", "data": {"name": "augmented", "flip": 0.5, "data": images(tmp_path / "images")}}
    with pytest.raises(ConfigError, match="data: what changes anew in each step cannot be encoded once"):
        build(Encode, Document({"model": model, "data": changing}, "stage"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat\ndog\n")
    words = {"cat": {"words": ["cat"], "append": True}}
    without_end = {"name": "concepts", "prompts": {"name": "prompts", "path": str(prompts), "size": 16}, "concepts": words}
    with pytest.raises(ConfigError, match="data: concepts has no end"):
        build(Encode, Document({"model": model, "data": without_end}, "stage")).execute(tmp_path / "cache")


def test_nothing_need_be_held_out(pipeline: Path, tmp_path: Path) -> None:
    data = build(Data, Document(images(tmp_path / "images"), "test"))  # type: ignore[type-abstract]
    Encode(Pretrained(str(pipeline)), data).execute(tmp_path / "cache")
    latents = Latents(str(tmp_path / "cache"))
    assert len(latents.split("train")) == 8
    with pytest.raises(EmptySplit, match="cache have no held_out split; encode data that have one"):
        latents.split("held_out")


def test_weights_of_samples_are_in_the_cache(tmp_path: Path) -> None:
    directory = dit(tmp_path / "dit")
    data = {"name": "resampled", "balance": "classes", "unbiased": True, "data": images(tmp_path / "images") | {"held_out": 0.5}}
    build(Encode, Document({"model": {"name": "pretrained", "directory": str(directory)}, "data": data}, "stage")).execute(
        tmp_path / "cache"
    )
    cached = Latents(str(tmp_path / "cache"))
    assert cached.weighted and "weight" in cached.split("train")[0]
    settings = run_settings(directory, {"name": "latents", "directory": str(tmp_path / "cache")})
    with pytest.raises(ConfigError, match="data: distribution_matching does not weigh its samples"):
        run_of(settings | {"method": "distribution_matching"})


def test_texts_stay_on_disk_until_their_rows_are_read(cache: Path) -> None:
    items = Latents(str(cache)).split("train")
    assert [len(part["prompt"]) for part in items.texts] == [8, 8, 8, 8, 4]  # none were put together
    rows = items.batch(torch.tensor([27, 0]))
    whole = torch.cat([part["prompt"] for part in items.texts])
    assert torch.equal(rows["condition/prompt"], whole[rows["caption"]])


RECIPE = """
stages:
  cache: {{name: encode, model: &model {{name: pretrained, directory: {pipeline}}}, data: captioned_patches}}
  tuned:
    name: train
    run:
      method: {{name: draft, reward: {{name: brightness}}, sampler: {{name: ddim, steps: 2}}}}
      data: {{name: latents, directory: '${{output:cache}}'}}
      model: *model
      engine: torch
      training: {{samples: 4, batch_size: 2}}
output: {output}
"""


def test_a_recipe_trains_from_a_cache_of_a_pipeline_that_is_there_and_encodes_anew_when_it_changes(tmp_path: Path) -> None:
    """The method looks at its data, which are not there as the recipe is read."""
    directory, said = stable_diffusion(tmp_path / "sd"), []
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(pipeline=directory, output=tmp_path / "out"))
    run_recipe(load_recipe(tmp_path / "recipe.yaml"), said.append)
    assert not any("again" in line or "skipped" in line for line in said)
    before = load_recipe(tmp_path / "recipe.yaml").stages["cache"].settings()
    config = directory / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.18215", "0.2"))
    said.clear()
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert changed_keys(before, recipe.stages["cache"].settings()) == ["encoder"]
    run_recipe(recipe, said.append)
    assert "cache: runs again: encoder changed" in said and "tuned: runs again: cache ran again" in said
    said.clear()
    run_recipe(load_recipe(tmp_path / "recipe.yaml", ["stages.cache.actors=3"]), said.append)  # makes no other cache
    assert [line for line in said if "skipped" not in line] == []


def test_classes_stay_classes_and_unreadable_images_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a pipeline without prompts, from images that are read one by one."""
    pipeline = dit(tmp_path / "dit")
    data = {**images(tmp_path / "images"), "held_out": 0.5}
    stage = build(Encode, Document({"model": {"name": "pretrained", "directory": str(pipeline)}, "data": data, "shard": 3}, "stage"))
    items = stage.data.split("train")
    inner = type(items).__getitem__

    def torn(self: Any, index: int) -> dict[str, Tensor]:
        if index == 0 and len(self) == len(items):
            raise CorruptItem("picture 0 is torn")
        return inner(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(items), "__getitem__", torn)
        stage.execute(tmp_path / "cache")
    assert "left out: picture 0 is torn" in caplog.text
    found = Latents(str(tmp_path / "cache"))
    split = found.split("train")
    assert len(split) == len(items) - 1 and list(found.class_names) == list(stage.data.class_names)
    assert [int(split[i]["label"]) for i in range(len(split))] == [int(items[i + 1]["label"]) for i in range(len(split))]
    run = run_of(run_settings(pipeline, {"name": "latents", "directory": str(tmp_path / "cache")}))
    batch = encoded(split.batch(torch.arange(2)) | {"index": torch.arange(2)}, run.data, run.codec(), 0, torch.device("cpu"))
    direct = (
        run_of(run_settings(pipeline, data))
        .codec()
        .encode({"x": items[1]["x"][None], "label": items[1]["label"][None]}, Noise(0, torch.arange(1)))
    )
    assert batch["x"].shape[1:] == direct["x"].shape[1:] and not any(key.startswith("condition/") for key in batch)
