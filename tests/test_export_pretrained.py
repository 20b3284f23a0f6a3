"""Pipelines in, pipelines out: each family is loaded, trained whole and by adapter, resumed, exported and drawn by diffusers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from gentrain.config import ConfigError
from gentrain.export_pretrained import how_to_draw
from gentrain.models.pretrained import Pretrained
from gentrain.noise import Noise, derive
from gentrain.recipes.export import Export
from gentrain.recipes.generate import GRID, INFO, SAMPLES, Generate
from gentrain.samplers.ddim import DDIM
from gentrain.samplers.few_step import FewStep
from gentrain.training.checkpoint import CheckpointError
from gentrain.training.loop import train
from gentrain.training.roles import load_network
from gentrain.training.run import save_config
from gentrain.training.world import World
from tests.distributed.cases import difference, records, run_of, state_of
from tests.models.pipelines import PIPELINES, SIDE, SIDES, call, images

ALONE = World(0, 1, torch.device("cpu"))
ADAPTER = {"rank": 2, "alpha": 4.0, "targets": ["attention", "feed_forward"]}
FLOW = {"stable_diffusion_3", "flux", "sana"}


def settings(root: Path, family: str, output: str, **more: Any) -> dict[str, Any]:
    directory = root / family
    if not directory.exists():
        PIPELINES[family](directory)
    return {
        "method": {"name": "flow_matching" if family in FLOW else "diffusion", "label_dropout": 0.5},
        "data": images(root / f"images-{family}", SIDES.get(family, SIDE)),
        "model": {"name": "pretrained", "directory": str(directory)},
        "engine": "torch",
        "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.0},
        "training": {"samples": 8, "batch_size": 4, "log_every": 4, "ema_half_life": 4, "ema_warmup": 0},
        "output": str(root / output),
        **more,
    }  # fmt: skip


def trained(values: dict[str, Any], stop_at: int | None = None) -> Path:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return stop_at is not None and asked > stop_at

    run = run_of(values)
    save_config(run)
    train(run, ALONE, should_stop)
    return run.directory


def drawn(pipeline: Any, side: int) -> Tensor:
    """Two images of the pipeline, from the same latents each time."""
    return torch.as_tensor(call(pipeline, side, steps=2, guidance=3.0))


def reloaded(directory: Path) -> Any:
    return DiffusionPipeline.from_pretrained(directory)


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["whole", "adapter"])
def test_a_pipeline_is_trained_resumed_exported_and_draws_the_same_images(
    tmp_path: Path, family: str, adapter: dict[str, Any] | None
) -> None:
    whole = trained(settings(tmp_path, family, "whole", adapter=adapter))
    halves = settings(tmp_path, family, "halves", adapter=adapter)
    trained(halves, stop_at=1)
    trained(halves)
    assert records(whole) == records(tmp_path / "halves") and difference(state_of(whole), state_of(tmp_path / "halves")) == 0

    denoiser, run = load_network(whole)
    weights = denoiser.network.merged() if adapter else denoiser.network.state_dict()  # type: ignore[attr-defined]
    out = Export(run=str(whole)).write(tmp_path / "out")
    exported, original = reloaded(out), reloaded(tmp_path / family)
    assert type(exported) is type(original)
    for name, value in getattr(exported, run.model.family.denoiser).state_dict().items():  # type: ignore[attr-defined]
        assert torch.equal(value, weights[f"backbone.{name}"]), name
    side = SIDES.get(family, SIDE)
    after = drawn(exported, side)
    assert not torch.allclose(after, drawn(original, side), atol=1e-3)
    getattr(original, run.model.family.denoiser).load_state_dict({k.removeprefix("backbone."): v for k, v in weights.items()})  # type: ignore[attr-defined]
    assert torch.equal(after, drawn(original, side))


def test_what_no_role_reads_is_given_back(tmp_path: Path) -> None:
    """A safety checker of the pipeline's own module, and an image processor under its former name: as Stable Diffusion 1 was published."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    values, directory = settings(tmp_path, "stable_diffusion", "run", adapter=ADAPTER), tmp_path / "stable_diffusion"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=sizes, vision_config=sizes | {"image_size": 32, "patch_size": 16}))
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    parts = StableDiffusionPipeline.from_pretrained(directory, safety_checker=None).components
    StableDiffusionPipeline(**parts | {"safety_checker": checker, "feature_extractor": processor}).save_pretrained(directory)
    index = directory / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"feature_extractor": ["transformers", "CLIPFeatureExtractor"]}))
    exported = reloaded(Export(run=str(trained(values))).write(tmp_path / "out"))
    assert exported.feature_extractor.crop_size["height"] == 32
    for name, value in exported.safety_checker.state_dict().items():
        assert torch.equal(value, checker.state_dict()[name]), name


@pytest.mark.parametrize("family", PIPELINES)
def test_an_adapter_alone_draws_as_the_merged_pipeline_does(tmp_path: Path, family: str) -> None:
    run = trained(settings(tmp_path, family, "run", adapter=ADAPTER))
    merged = reloaded(Export(run=str(run)).write(tmp_path / "merged"))
    adapter = Export(run=str(run), form="adapter").write(tmp_path / "adapter")
    pipeline, side = reloaded(tmp_path / family), SIDES.get(family, SIDE)
    before = drawn(pipeline, side)
    if family in ("dit", "pixart_sigma"):  # without load_lora_weights
        from peft import PeftModel

        pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, adapter)
    else:
        pipeline.load_lora_weights(adapter)
    assert not torch.allclose(drawn(pipeline, side), before, atol=1e-3)
    torch.testing.assert_close(drawn(pipeline, side), drawn(merged, side), rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["pipeline", "adapter"])
def test_a_card_tells_what_was_trained_how_and_how_well(tmp_path: Path, form: Any) -> None:
    values = settings(tmp_path, "stable_diffusion", "run", adapter=ADAPTER)
    run = trained(values | {"data": values["data"] | {"licence": "drawn by Ada, CC BY 4.0"}})
    (tmp_path / "scores").mkdir()
    metric = {"name": "likeness", "value": 0.25, "low": 0.2, "high": 0.3, "better": "higher", "definition": "to the real ones"}
    (tmp_path / "scores" / "metrics.json").write_text(json.dumps({"metrics": [metric]}))
    card = (Export(run=str(run), form=form, scores=str(tmp_path / "scores")).write(tmp_path / "out") / "README.md").read_text()
    assert f"of `{tmp_path / 'stable_diffusion'}`, a StableDiffusionPipeline" in card
    for said in (
        "library_name: diffusers", "pipeline_tag: text-to-image", "drawn by Ada, CC BY 4.0 What it began with has a licence of its own",
        "diffusion; path variance_preserving, prediction eps", "| likeness | 0.25 | 0.2 to 0.3 | higher | to the real ones |", "rank: 2",
    ):  # fmt: skip
        assert said in card, said


def test_an_adapter_is_refused_on_another_pipeline(tmp_path: Path) -> None:
    """As it goes on, as it is drawn from, and as it is exported in either form."""
    values = settings(tmp_path, "stable_diffusion", "run", adapter=ADAPTER)
    run = trained(values)
    UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(tmp_path / "stable_diffusion" / "unet")).save_pretrained(
        tmp_path / "stable_diffusion" / "unet"
    )
    said = r"role .model. learnt .* was trained on other weights than those below it now"
    with pytest.raises(CheckpointError, match=said):
        trained(values | {"training": values["training"] | {"samples": 12}})
    with pytest.raises(CheckpointError, match=said):
        Generate(run=str(run), count=1, prompts=["cat"]).execute(tmp_path / "drawn")
    for form in ("pipeline", "adapter"):
        with pytest.raises(CheckpointError, match=said):
            Export(run=str(run), form=form).write(tmp_path / form)  # type: ignore[arg-type]


@pytest.mark.parametrize("family, file", [("stable_diffusion", "pytorch_lora_weights.safetensors"), ("dit", "adapter_model.safetensors")])
def test_an_adapter_alone_is_written_in_the_format_of_its_pipeline(tmp_path: Path, family: str, file: str) -> None:
    from safetensors import safe_open

    run = trained(settings(tmp_path, family, "run", adapter=ADAPTER))
    adapter = Export(run=str(run), form="adapter").write(tmp_path / "adapter")
    assert {path.name for path in adapter.iterdir()} == {file, "README.md"} | ({"adapter_config.json"} if family == "dit" else set())
    network: Any = load_network(run)[0].network
    prefix = "unet." if family == "stable_diffusion" else "base_model.model."
    with safe_open(adapter / file, "pt") as opened:
        names = set(opened.keys())
        assert names == {name.replace("adapter.backbone.", prefix) for name in network.state_dict()}
        name = min(name for name in network.state_dict() if "lora_B" in name)
        within = network.settings.scale if family == "stable_diffusion" else 1.0  # what the file alone must tell
        assert torch.equal(opened.get_tensor(name.replace("adapter.backbone.", prefix)), network.state_dict()[name] * within)
        if family == "dit":
            said = json.loads((adapter / "adapter_config.json").read_text())
        else:
            flat = json.loads(opened.metadata()["lora_adapter_metadata"])
            said = {key.removeprefix("unet."): value for key, value in flat.items()}
    assert said["r"] == 2 and said["lora_alpha"] * within == 4.0
    assert "load_lora_weights" in (adapter / "README.md").read_text() or family == "dit"


def test_samples_are_images_of_the_prompts_that_are_asked_for(tmp_path: Path) -> None:
    run = trained(settings(tmp_path, "stable_diffusion", "run", adapter=ADAPTER))
    stage = Generate(run=str(run), count=3, prompts=["cat", "zoo"], sampler=DDIM(steps=2, guidance=2.0))
    stage.execute(tmp_path / "drawn")
    x = load_file(tmp_path / "drawn" / SAMPLES)["x"]
    assert x.shape == (3, 3, SIDE, SIDE) and x.abs().max() <= 1 and (tmp_path / "drawn" / GRID).is_file()
    denoiser, opened = load_network(run)
    codec, noise = opened.codec(), Noise(derive(0, "generate"), torch.arange(3))
    with torch.no_grad():
        condition = codec.condition(torch.tensor([0, 1, 0]), ["cat", "zoo"])
        again = codec.decode(DDIM(steps=2, guidance=2.0).sample(denoiser, (3, *codec.shape), noise, condition))
    assert torch.equal(x, again)
    away = Generate(run=str(run), count=3, prompts=["cat", "zoo"], negative_prompt="dog", sampler=DDIM(steps=2, guidance=2.0))
    away.execute(tmp_path / "away")
    opened.model.null_prompt = "dog"  # type: ignore[attr-defined]
    (tmp_path / "told").mkdir()
    save_config(opened)
    drawn = load_file(tmp_path / "away" / SAMPLES)["x"]
    stage.execute(tmp_path / "told")
    assert torch.equal(drawn, load_file(tmp_path / "told" / SAMPLES)["x"]) and (drawn - x).abs().max() > 1e-3
    assert json.loads((tmp_path / "away" / INFO).read_text())["negative_prompt"] == "dog"
    with pytest.raises(ConfigError, match=r"negative_prompt: the sampler draws without guidance"):
        Generate(run=str(run), prompts=["cat"], negative_prompt="dog").execute(tmp_path / "none")
    classes = trained(settings(tmp_path, "dit", "classes", adapter=ADAPTER))
    with pytest.raises(ConfigError, match=r"negative_prompt: this run's network takes classes"):
        Generate(run=str(classes), negative_prompt="dog", sampler=DDIM(guidance=2.0)).execute(tmp_path / "none")
    with pytest.raises(ConfigError, match="prompts: prompts stand in place of labels"):
        Generate(run=str(run), prompts=["cat"], labels=[0])


def test_previews_are_images(tmp_path: Path) -> None:
    values = settings(tmp_path, "stable_diffusion", "run", adapter=ADAPTER, sampler={"name": "ddim", "steps": 2})
    values["training"] |= {"preview_every": 4, "preview_count": 2}
    drawn = sorted((trained(values) / "samples").iterdir())
    assert len(drawn) == 2
    with Image.open(drawn[0]) as first, Image.open(drawn[1]) as second:
        assert first.tobytes() != second.tobytes()


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("stable_diffusion", "pipeline.scheduler.init_noise_sigma = "),
        ("stable_diffusion_3", "height=height, width=width, latents=latents, sigmas=[0.71429, 0.35714], guidance_scale=1)"),
        ("flux", "latents=latents, sigmas=[0.71429, 0.35714], guidance_scale=3.5)"),
        ("dit", "A DiTPipeline cannot be called at times of its student's own"),
    ],
)
def test_how_to_draw_with_a_student_of_two_steps(family: str, said: str, tmp_path: Path) -> None:
    """The noise at the level that the first call reads: some pipelines scale it themselves, others do not."""
    network: Any = Pretrained(directory=str(PIPELINES[family](tmp_path))).build((4, 8, 8), 0)
    use = how_to_draw(FewStep(steps=2), network)
    assert said in use and ("latents = 0.71429 * torch.randn" in use) == (family in ("stable_diffusion_3", "flux"))
    assert ("_pack_latents" in use) == (family == "flux")
