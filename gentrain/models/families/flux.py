"""FLUX.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from gentrain.config import register
from gentrain.models.control import CONTROL
from gentrain.models.families.base import Family, Texts

_PATCH = 2  # latents along a side of what is one token
_T5_TOKENS = 512  # the pipeline's own number
_CONTROL_BLOCKS = {"num_layers": 4, "num_single_layers": 10}  # at most, as from_transformer of diffusers takes
_CONTROL_FACTOR = 8  # by which its ControlNet shrinks an image


@register("flux")
class Flux(Family):
    """FluxTransformer2DModel, a rectified flow on 16 channels of latents, 2 x 2 of them a token; T5, and CLIP for the pooled text.

    A network that was distilled from a guided one (dev) reads the guidance weight too: `guidance_input`.
    """

    pipelines = ("FluxPipeline",)
    network = "FluxTransformer2DModel"
    text_components = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    control_net = "FluxControlNetModel"
    control_copies = ("time_text_embed", "context_embedder", "x_embedder", "transformer_blocks", "single_transformer_blocks")
    control_is = "signed"
    scales_noise = False
    packing = "\nlatents = pipeline._pack_latents(latents, *latents.shape)"

    @property
    def grain(self) -> int:
        return self.factor * _PATCH

    @property
    def denoiser_channels(self) -> int:
        return int(self.config["in_channels"]) // _PATCH**2

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        height, width = (side // _PATCH for side in x.shape[-2:])
        output: Tensor = network(**self._told(x, t, condition), **condition.get(CONTROL, {}), return_dict=False)[0]
        return pixel_shuffle(output.transpose(1, 2).reshape(len(x), -1, height, width), _PATCH)

    def control_branch(self, network: Any, channels: int) -> nn.Module:
        if self.factor != _CONTROL_FACTOR:
            raise ValueError(f"FluxControlNetModel shrinks its control by 8, latents of this pipeline are {self.factor} times smaller")
        blocks = {name: min(network.config[name], most) for name, most in _CONTROL_BLOCKS.items()}
        # it reads the image itself, in patches as the latents are
        return self._control_branch(network, **blocks, patch_size=_PATCH, conditioning_embedding_channels=self.denoiser_channels)

    def steering(self, branch: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Any], control: Tensor) -> dict[str, Any]:
        double, single = branch(control, x.dtype, **self._told(x, t, condition))
        added = {"controlnet_block_samples": double, "controlnet_single_block_samples": single}
        return {**added, "controlnet_blocks_repeat": True}  # as the pipeline does with such a ControlNet

    def _told(self, x: Tensor, t: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        """What the transformer, and a ControlNet of it, are told."""
        packed = pixel_unshuffle(x, _PATCH)  # the channels of a token: those of the latent first, then the place in the patch
        rows, columns = torch.meshgrid(*(torch.arange(side, device=x.device) for side in packed.shape[-2:]), indexing="ij")
        image_ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(x.dtype)
        guidance = torch.full((len(x),), self.guidance_input, device=x.device) if self.config["guidance_embeds"] else None
        return {
            "hidden_states": packed.flatten(2).transpose(1, 2),
            "timestep": t / 1000,
            "guidance": guidance,
            "pooled_projections": condition["pooled"],
            "encoder_hidden_states": condition["prompt"],
            "txt_ids": image_ids.new_zeros(condition["prompt"].shape[1], 3),
            "img_ids": image_ids,
        }

    def texts(self, pipeline: Any, prompts: Sequence[str], device: torch.device) -> Texts:
        prompt, pooled, _ = pipeline.encode_prompt(list(prompts), None, device=device)
        return {"prompt": prompt, "pooled": pooled}

    def widths(self) -> tuple[int, int]:
        return self.source.read("text_encoder_2/config.json")["d_model"], self.config["joint_attention_dim"]

    def text_shapes(self) -> Texts:
        prompt = torch.empty(1, _T5_TOKENS, self.config["joint_attention_dim"], device="meta")
        return {"prompt": prompt, "pooled": torch.empty(1, self.config["pooled_projection_dim"], device="meta")}
