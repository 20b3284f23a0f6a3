"""Pipelines of the published sizes without weights: configurations alone, which are all that `gentrain plan` reads.

    python benchmarks/sizes.py DIRECTORY      # DIRECTORY/sd15, DIRECTORY/flux, and runs' configurations
    gentrain plan DIRECTORY/sd15.yaml --memory 24

Sizes are those of the public configurations (Stable Diffusion 1.5, SDXL base 1.0, Stable Diffusion 3 medium, FLUX.1 dev); the classes are
diffusers' and transformers' own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer

RUN = """\
# One-step distillation with three roles: a teacher, a fake score and a student.
model: {{name: pretrained, directory: {directory}}}
method: {{name: distribution_matching, generator_loss: dmd}}
data: {{name: prompts, path: {prompts}, size: {size}}}
optimizer: {{name: adamw, lr: 1.0e-5, weight_decay: 0.0}}
engine: {{name: deepspeed, zero_stage: {stage}, precision: bf16}}
{more}training: {{samples: 100_000, batch_size: {batch}, micro_batches: 1}}
cluster: {{place: ray, workers: 8, gpus_per_worker: 1}}
"""

FORGET = """\
# {what}
model: {{name: pretrained, directory: {directory}}}
method: {method}
data:
  name: concepts
  prompts: {{name: prompts, path: {prompts}, size: 512}}
  concepts: {{cat: {{words: [cat, kitten], replace: dog}}}}
adapter: {{rank: 64, targets: [attention, feed_forward]}}
optimizer: {{name: adamw, lr: 1.0e-5, beta1: 0.0, weight_decay: 0.0}}
engine: {{name: deepspeed, zero_stage: 2, precision: bf16}}
training: {{samples: 100_000, batch_size: 8, micro_batches: {portions}}}
cluster: {{place: ray, workers: 1, gpus_per_worker: 1}}
"""
FORGETTING = {  # run -> what it makes, its method, its micro-batches
    "sd15-sfd": (
        "A one-step pipeline that has forgotten a concept (sfd).",
        "{name: sfd, alpha: 1.0, lam: 1, mu: 1, guidance: 4.5, fake_guidance: 4.5, condition_dropout: 0.1}",
        2,
    ),
    "sd15-esd": ("A LoRA patch that makes the deployed pipeline forget a concept (esd).", "{name: esd}", 1),
}


def _autoencoder(**config: Any) -> Any:
    from diffusers import AutoencoderKL

    blocks: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512, **blocks, **config)


def _clip(width: int = 768, layers: int = 12, heads: int = 12) -> Any:
    """Of CLIP ViT-L/14; (1280, 32, 20) are those of OpenCLIP ViT-bigG/14."""
    from transformers import CLIPTextConfig

    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "projection_dim": width}
    return CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, **sizes)


def _t5() -> Any:
    """Of T5 v1.1 XXL."""
    from transformers import T5Config

    sizes: dict[str, Any] = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes)


def stable_diffusion(directory: Path) -> None:
    """The configurations of a pipeline of the size of Stable Diffusion 1.5."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = _autoencoder(latent_channels=4, scaling_factor=0.18215)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1)
    for name, part in {"unet": unet, "vae": vae, "scheduler": scheduler}.items():
        part.save_config(directory / name)
    _clip().save_pretrained(directory / "text_encoder")
    _index(directory, "StableDiffusionPipeline", {
        "unet": "diffusers.UNet2DConditionModel", "vae": "diffusers.AutoencoderKL", "scheduler": "diffusers.DDIMScheduler",
        "text_encoder": "transformers.CLIPTextModel", "tokenizer": "transformers.CLIPTokenizer",
    })  # fmt: skip


def stable_diffusion_xl(directory: Path) -> None:
    """The configurations of a pipeline of the size of SDXL base 1.0."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    attending = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D", *attending[0]),
            up_block_types=(*attending[1], "UpBlock2D"), transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048, addition_embed_type="text_time", addition_time_embed_dim=256, use_linear_projection=True,
            projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        vae = _autoencoder(latent_channels=4, scaling_factor=0.13025)
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    for name, part in {"unet": unet, "vae": vae, "scheduler": scheduler}.items():
        part.save_config(directory / name)
    _clip().save_pretrained(directory / "text_encoder")
    _clip(1280, 32, 20).save_pretrained(directory / "text_encoder_2")
    _index(directory, "StableDiffusionXLPipeline", {
        "unet": "diffusers.UNet2DConditionModel", "vae": "diffusers.AutoencoderKL", "scheduler": "diffusers.EulerDiscreteScheduler",
        "text_encoder": "transformers.CLIPTextModel", "tokenizer": "transformers.CLIPTokenizer",
        "text_encoder_2": "transformers.CLIPTextModelWithProjection", "tokenizer_2": "transformers.CLIPTokenizer",
    })  # fmt: skip


def stable_diffusion_3(directory: Path) -> None:
    """The configurations of a pipeline of the size of Stable Diffusion 3 medium."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192,
        )  # fmt: skip
        vae = _autoencoder(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for name, part in {"transformer": transformer, "vae": vae, "scheduler": scheduler}.items():
        part.save_config(directory / name)
    for name, config in {"text_encoder": _clip(), "text_encoder_2": _clip(1280, 32, 20), "text_encoder_3": _t5()}.items():
        config.save_pretrained(directory / name)
    clip = {"text": "transformers.CLIPTextModelWithProjection", "tokens": "transformers.CLIPTokenizer"}
    _index(directory, "StableDiffusion3Pipeline", {
        "transformer": "diffusers.SD3Transformer2DModel", "vae": "diffusers.AutoencoderKL",
        "scheduler": "diffusers.FlowMatchEulerDiscreteScheduler", "text_encoder": clip["text"], "tokenizer": clip["tokens"],
        "text_encoder_2": clip["text"], "tokenizer_2": clip["tokens"], "text_encoder_3": "transformers.T5EncoderModel",
        "tokenizer_3": "transformers.T5Tokenizer",
    })  # fmt: skip


def flux(directory: Path) -> None:
    """The configurations of a pipeline of the size of FLUX.1 dev."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)  # its other sizes are the class' own
        vae = _autoencoder(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for name, part in {"transformer": transformer, "vae": vae, "scheduler": scheduler}.items():
        part.save_config(directory / name)
    _clip().save_pretrained(directory / "text_encoder")
    _t5().save_pretrained(directory / "text_encoder_2")
    _index(directory, "FluxPipeline", {
        "transformer": "diffusers.FluxTransformer2DModel", "vae": "diffusers.AutoencoderKL",
        "scheduler": "diffusers.FlowMatchEulerDiscreteScheduler", "text_encoder": "transformers.CLIPTextModel",
        "tokenizer": "transformers.CLIPTokenizer", "text_encoder_2": "transformers.T5EncoderModel",
        "tokenizer_2": "transformers.T5Tokenizer",
    })  # fmt: skip


def _index(directory: Path, pipeline: str, components: dict[str, str]) -> None:
    index = {"_class_name": pipeline, **{name: cls.split(".") for name, cls in components.items()}}
    (directory / "model_index.json").write_text(json.dumps(index, indent=1))


def write(directory: Path) -> None:
    """Both pipelines, a run's configuration for each, and for the smaller one those of two that forget."""
    directory.mkdir(parents=True, exist_ok=True)
    prompts = directory / "prompts.txt"
    prompts.write_text("".join(f"a photo of {what}\n" for what in ("a rose", "a cat", "a house", "a boat")))
    adapter = "adapter: {rank: 16}\n"
    for name, make, settings in (
        ("sd15", stable_diffusion, {"stage": 2, "size": 512, "batch": 64, "more": ""}),
        ("flux", flux, {"stage": 2, "size": 1024, "batch": 8, "more": adapter}),
    ):
        make(directory / name)
        (directory / f"{name}.yaml").write_text(RUN.format(directory=directory / name, prompts=prompts, **settings))
    for name, (what, method, portions) in FORGETTING.items():
        told = FORGET.format(what=what, method=method, portions=portions, directory=directory / "sd15", prompts=prompts)
        (directory / f"{name}.yaml").write_text(told)


if __name__ == "__main__":
    typer.run(write)
