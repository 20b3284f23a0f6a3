"""Tiny pipelines of diffusers with random weights and tokenizers of their own, as the tests of pretrained networks need them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

SIDE = 16  # pixels of an image; 8 of a latent
PROMPTS = ["cat", "a dog"]
SIDES = {"sana": 32}  # of families whose pipeline wants more
WORDS = 8  # tokens of a prompt


def clip_tokenizer() -> Any:
    """Letters, and letters that end a word."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=WORDS)


def clip_config(tokenizer: Any, width: int = 16) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=WORDS, bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1, pad_token_id=len(tokenizer) - 1,
        projection_dim=width,
    )  # fmt: skip


def autoencoder(channels: int = 4, levels: int = 2, **config: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * (levels - 1) + (16,), down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, layers_per_block=1, latent_channels=channels, norm_num_groups=4, sample_size=SIDE,
        **config,
    )  # fmt: skip


def stable_diffusion(directory: Path, **scheduler: Any) -> Path:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2, block_out_channels=(16, 32), layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False, "steps_offset": 1}
    schedule = DDIMScheduler(**settings | {"set_alpha_to_one": False} | scheduler)
    encoder = CLIPTextModel(clip_config(tokenizer))
    parts = (autoencoder(scaling_factor=0.18215), encoder, tokenizer, unet, schedule, None, None)
    StableDiffusionPipeline(*parts, requires_safety_checker=False).save_pretrained(directory)
    return directory


def dit(directory: Path) -> Path:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=SIDE // 2, patch_size=2,
        num_embeds_ada_norm=1000,  # the pipeline takes 1000 for the null class
    )  # fmt: skip
    DiTPipeline(transformer, autoencoder(scaling_factor=0.18215), DDIMScheduler(clip_sample=False)).save_pretrained(directory)
    return directory


def t5() -> tuple[Any, Any]:
    """A tokenizer of letters and its encoder, 16 wide."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [(chr(code), -3.0) for code in range(ord("a"), ord("z") + 1)]
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config)


def gemma() -> tuple[Any, Any]:
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *letters]
    tokenizer = GemmaTokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[])
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return tokenizer, Gemma2Model(config)


def stable_diffusion_xl(directory: Path) -> Path:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2, block_out_channels=(16, 32), layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32, attention_head_dim=(2, 4), norm_num_groups=8,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip
    schedule = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1)
    encoders = CLIPTextModel(clip_config(tokenizer)), CLIPTextModelWithProjection(clip_config(tokenizer))
    parts = (autoencoder(scaling_factor=0.13025), *encoders, tokenizer, clip_tokenizer(), unet, schedule)
    StableDiffusionXLPipeline(*parts, add_watermarker=False).save_pretrained(directory)
    return directory


def stable_diffusion_3(directory: Path) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
    )  # fmt: skip
    encoders = CLIPTextModelWithProjection(clip_config(tokenizer)), CLIPTextModelWithProjection(clip_config(tokenizer))
    third, encoder = t5()
    encoder.config.d_model = 32
    encoder = type(encoder)(encoder.config)
    StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(scaling_factor=1.5, shift_factor=0.06), encoders[0], tokenizer,
        encoders[1], clip_tokenizer(), encoder, third,
    ).save_pretrained(directory)  # fmt: skip
    return directory


def flux(directory: Path, guidance: bool = True, levels: int = 2, layers: int = 1) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=layers, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance,
    )  # fmt: skip
    vae = autoencoder(levels=levels, scaling_factor=0.3611, shift_factor=0.1159)
    second, encoder = t5()
    parts = (FlowMatchEulerDiscreteScheduler(), vae, CLIPTextModel(clip_config(tokenizer)), tokenizer, encoder, second, transformer)
    FluxPipeline(*parts).save_pretrained(directory)
    return directory


def pixart_sigma(directory: Path) -> Path:
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=SIDE // 2, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=16,
        cross_attention_dim=16, in_channels=4, out_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    tokenizer, encoder = t5()
    schedule = DDIMScheduler(clip_sample=False, steps_offset=1)
    PixArtSigmaPipeline(tokenizer, encoder, autoencoder(scaling_factor=0.13025), transformer, schedule).save_pretrained(directory)
    return directory


def sana(directory: Path, layers: int = 1, timestep_scale: float = 0.5) -> Path:
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=layers, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16, sample_size=SIDE // 2,
        timestep_scale=timestep_scale,
    )  # fmt: skip
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1], downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    tokenizer, encoder = gemma()
    SanaPipeline(tokenizer, encoder, vae, transformer, FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(directory)
    return directory


PIPELINES: dict[str, Callable[..., Path]] = {
    "stable_diffusion": stable_diffusion,
    "stable_diffusion_xl": stable_diffusion_xl,
    "stable_diffusion_3": stable_diffusion_3,
    "flux": flux,
    "pixart_sigma": pixart_sigma,
    "sana": sana,
    "dit": dit,
}


def call(pipeline: Any, side: int, steps: int, guidance: float, **more: Any) -> Any:
    """Draws PROMPTS, or classes 0 and 1, with a pipeline: [2, side, side, 3] in [0, 1], from the same latents each time."""
    pipeline.set_progress_bar_config(disable=True)
    known = inspect.signature(pipeline.__call__).parameters
    what: dict[str, Any] = {"class_labels": [0, 1]} if "class_labels" in known else {"prompt": PROMPTS, "height": side, "width": side}
    what |= {key: False for key in ("clean_caption", "use_resolution_binning") if key in known} | more
    generator = torch.manual_seed(3)
    return pipeline(**what, num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="np").images


def images(directory: Path, side: int = SIDE) -> dict[str, Any]:
    """Settings of a data set of eight colour images of two classes, which are written below `directory`."""
    generator = torch.Generator().manual_seed(1)
    for index in range(8):
        file = directory / ("cat", "dog")[index % 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(file)
    return {"name": "image_folder", "path": str(directory), "size": side, "held_out": 0.0}
