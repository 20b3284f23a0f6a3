"""Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gentrain.config import register
from gentrain.models.families.base import Texts
from gentrain.models.families.stable_diffusion import StableDiffusion


@register("stable_diffusion_xl")
class StableDiffusionXL(StableDiffusion):
    """UNet2DConditionModel, two CLIP text encoders, the pooled text and the image's sizes beside the time.

    The sizes given are those of the image itself, nothing cropped: (H, W, 0, 0, H, W).
    """

    pipelines = ("StableDiffusionXLPipeline",)
    text_components = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")

    def told(self, x: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        height, width = (self.factor * side for side in x.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=x.dtype, device=x.device).expand(len(x), -1)
        return {**super().told(x, condition), "added_cond_kwargs": {"text_embeds": condition["pooled"], "time_ids": sizes}}

    def texts(self, pipeline: Any, prompts: Sequence[str], device: torch.device) -> Texts:
        prompt, _, pooled, _ = pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
        return {"prompt": prompt, "pooled": pooled}

    def text_shapes(self) -> Texts:
        pooled = self.source.read("text_encoder_2/config.json")["projection_dim"]
        prompt = torch.empty(1, self._tokens("text_encoder"), self.config["cross_attention_dim"], device="meta")
        return {"prompt": prompt, "pooled": torch.empty(1, pooled, device="meta")}

    def null(self, pipeline: Any, prompt: str, device: torch.device) -> Texts:
        texts = self.texts(pipeline, [prompt], device)
        if prompt == "" and self.source.index.get("force_zeros_for_empty_prompt", True):  # as the pipeline does itself
            return {name: torch.zeros_like(value) for name, value in texts.items()}
        return texts
