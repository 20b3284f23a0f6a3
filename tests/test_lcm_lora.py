"""LCM-LoRA: an adapter that latent_consistency teaches on a pipeline, drawn by diffusers alone as its card says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gentrain.config import ConfigError, Document, build
from gentrain.data.base import Data
from gentrain.models.denoiser import Denoiser
from gentrain.models.pretrained import Pretrained
from gentrain.noise import Noise, derive
from gentrain.recipes.export import Export
from gentrain.samplers.lcm import LCM
from gentrain.training.loop import train
from gentrain.training.roles import Roles, load_network
from gentrain.training.run import parse_run, save_config
from gentrain.training.world import World
from tests.models.pipelines import PROMPTS, images, stable_diffusion, stable_diffusion_3

ALONE = World(0, 1, torch.device("cpu"))


def flow_pipeline(directory: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(stable_diffusion(directory))
    pipeline.scheduler = DPMSolverMultistepScheduler(solver_order=1, prediction_type="flow_prediction", use_flow_sigmas=True)
    pipeline.save_pretrained(directory)


def settings(root: Path, **method: Any) -> dict[str, Any]:
    lcm = {"name": "lcm", "steps": 4, **{key: method[key] for key in ("grid",) if key in method}}
    return {
        "method": {"name": "latent_consistency", "guidance": [3, 3], **method},
        "data": images(root / "images"),
        "model": {"name": "pretrained", "directory": str(root / "pipeline")},
        "adapter": {"rank": 2, "targets": ["attention", "feed_forward"]},
        "engine": "torch",
        "optimizer": {"name": "adamw", "lr": 0.02, "weight_decay": 0.0},
        "sampler": lcm,
        "training": {"samples": 12, "batch_size": 4, "log_every": 4, "ema_half_life": 4, "ema_warmup": 0},
        "output": str(root / "run"),
    }  # fmt: skip


def noise() -> Noise:
    return Noise(derive(0, "generate"), torch.arange(len(PROMPTS)))


def ours(directory: Path) -> Tensor:
    denoiser, run = load_network(directory)
    codec = run.codec()
    with torch.no_grad():
        condition = codec.condition(torch.arange(len(PROMPTS)), PROMPTS)
        return codec.decode(run.sampler.sample(denoiser, (len(PROMPTS), *codec.shape), noise(), condition)) / 2 + 0.5


ZERO_TERMINAL = {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "zero_terminal_snr": True}


READS = {"method": {"name": "latent_consistency", "guidance": [2, 8]}, "adapter": None, "sampler": {"name": "lcm", "guidance": 5}}


@pytest.mark.parametrize(
    "kind, form, changed",
    [
        ("variance_preserving", "adapter", {}),
        ("variance_preserving", "pipeline", {}),
        ("flow", "adapter", {}),
        ("flow", "pipeline", {}),
        ("variance_preserving", "pipeline", READS),
    ],
)
def test_diffusers_alone_draws_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, form: Any, changed: dict[str, Any]
) -> None:
    """The code of the model card is run as it stands, on the same random numbers. Last: a whole network that reads its guidance."""
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion
    from diffusers.schedulers import scheduling_flow_match_lcm, scheduling_lcm

    (stable_diffusion if kind == "variance_preserving" else flow_pipeline)(tmp_path / "pipeline")
    run = parse_run(Document(settings(tmp_path, **({"grid": ZERO_TERMINAL} if kind == "flow" else {})) | changed, "x.yaml"))
    save_config(run)
    train(run, ALONE, lambda: False)
    card = (Export(run=str(run.directory), form=form).write(tmp_path / "out") / "README.md").read_text()
    use = re.search(r"```python\n(.*?)```", card, re.S)
    assert use is not None
    given = noise()
    for module in (pipeline_stable_diffusion, scheduling_lcm, scheduling_flow_match_lcm):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: given.normal(tuple(shape)))
    monkeypatch.chdir(tmp_path)
    spoken: dict[str, Any] = {"prompt": PROMPTS}
    exec(use[1], spoken)
    theirs = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(16, 16, 3) for image in spoken["images"]])
    torch.testing.assert_close(theirs.permute(0, 3, 1, 2) / 255, ours(run.directory), rtol=0, atol=2.5e-3)  # 1 / 255 and its half


def test_a_latent_consistency_model_of_diffusers_is_read_with_its_guidance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.pipelines.latent_consistency_models import pipeline_latent_consistency_text2img as stock
    from diffusers.schedulers import scheduling_lcm

    plain = StableDiffusionPipeline.from_pretrained(stable_diffusion(tmp_path / "plain"))
    unet = UNet2DConditionModel.from_config({**plain.unet.config, "time_cond_proj_dim": 256})
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.1)
    parts = (plain.vae, plain.text_encoder, plain.tokenizer, unet, LCMScheduler.from_config(plain.scheduler.config), None, None)
    pipeline = LatentConsistencyModelPipeline(*parts, requires_safety_checker=False)
    pipeline.save_pretrained(tmp_path / "pipeline")
    given = noise()
    for module in (stock, scheduling_lcm):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: given.normal(tuple(shape)))
    data = build(Data, Document(images(tmp_path / "images"), "x.yaml"))  # type: ignore[type-abstract]
    model = Pretrained(str(tmp_path / "pipeline"))
    codec, law = model.codec(data), model.law()
    assert law is not None
    denoiser = Denoiser(model.build(codec.shape, 2), *law)
    drawn = {}
    for guidance in (1.5, 6.0):
        with torch.no_grad():
            condition = codec.condition(torch.arange(len(PROMPTS)), PROMPTS)
            x = LCM(steps=3, guidance=guidance).sample(denoiser, (len(PROMPTS), *codec.shape), noise(), condition)
        drawn[guidance] = codec.decode(x) / 2 + 0.5
        given = noise()
        theirs = pipeline(PROMPTS, 16, 16, num_inference_steps=3, guidance_scale=guidance, output_type="pt").images
        torch.testing.assert_close(drawn[guidance], theirs, rtol=1e-3, atol=1e-4)
    assert (drawn[1.5] - drawn[6.0]).abs().max() > 0.01


def test_an_exported_autoencoder_is_known_as_the_one_it_came_from(tmp_path: Path) -> None:
    """So that latents made with one serve the other: diffusers adds to its configuration where it was loaded from."""
    original = Pretrained(directory=str(stable_diffusion(tmp_path / "pipeline")))
    run = parse_run(Document({**settings(tmp_path), "adapter": None, "method": "diffusion", "sampler": "ddim"}, "x.yaml"))
    save_config(run)
    train(run, ALONE, lambda: False)
    exported = Pretrained(directory=str(Export(run=str(run.directory)).write(tmp_path / "out")))
    assert "_name_or_path" in exported.family.vae_config
    before = original.family.source.digest(("vae",))
    assert exported.family.source.digest(("vae",)) == before
    changed = tmp_path / "out" / "vae" / "config.json"
    changed.write_text(changed.read_text().replace("0.18215", "0.2"))
    assert exported.family.source.digest(("vae",)) != before


@pytest.mark.parametrize("pipeline, message", [
    (stable_diffusion, "adapter.targets: no layer that reads guidance is among the targets; .* two equal weights in method.guidance"),
    (stable_diffusion_3, r"StableDiffusion3Pipeline takes no further input \(guidance\); two equal weights in method.guidance"),
])  # fmt: skip
def test_a_weight_that_no_layer_would_learn_to_read_is_refused_with_what_to_do(tmp_path: Path, pipeline: Any, message: str) -> None:
    pipeline(tmp_path / "pipeline")
    asked = parse_run(Document(settings(tmp_path) | {"method": READS["method"], "sampler": READS["sampler"]}, "x.yaml"))
    with pytest.raises(ConfigError, match=message):
        Roles(asked, ALONE)


def test_the_target_begins_as_the_student_and_follows_it(tmp_path: Path) -> None:
    """The average of two adapters is that of their products only where they begin alike."""
    stable_diffusion(tmp_path / "pipeline")
    roles = Roles(parse_run(Document(settings(tmp_path), "x.yaml")), ALONE)
    student, target = (roles.engines[role].weights() for role in ("student", "target"))
    assert student and all(torch.equal(value, target[name]) for name, value in student.items())
