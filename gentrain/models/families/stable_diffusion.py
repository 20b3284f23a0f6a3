"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gentrain.config import register
from gentrain.models.families.base import Family, Texts


@register("stable_diffusion")
class StableDiffusion(Family):
    """UNet2DConditionModel on 4 channels of latents, one CLIP text encoder, eps (1.x, 2.x base) or v (2.x 768).

    Latent consistency models of theirs, whose UNet reads a guidance weight, too.
    """

    pipelines = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    denoiser = "unet"
    time_embedding = "time_embedding"

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        told = {"timestep_cond": condition.get("guidance"), "return_dict": False}
        output: Tensor = network(x, t, encoder_hidden_states=condition["prompt"], **told)[0]
        return output

    def texts(self, pipeline: Any, prompts: Sequence[str], device: torch.device) -> Texts:
        return {"prompt": pipeline.encode_prompt(list(prompts), device, 1, False)[0]}

    def text_shapes(self) -> Texts:
        return {"prompt": torch.empty(1, self._tokens("text_encoder"), self.config["cross_attention_dim"], device="meta")}
