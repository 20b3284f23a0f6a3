"""PixArt-Sigma."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gentrain.config import register
from gentrain.models.families.base import Family, Texts

_TOKENS = 300  # the pipeline's own number


@register("pixart_sigma")
class PixArtSigma(Family):
    """PixArtTransformer2DModel with T5; of its 8 output channels the last 4, the learned variance, are left aside."""

    pipelines = ("PixArtSigmaPipeline",)
    network = "PixArtTransformer2DModel"

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        output: Tensor = network(
            x,
            encoder_hidden_states=condition["prompt"],
            encoder_attention_mask=condition["mask"],
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : x.shape[1]]

    def texts(self, pipeline: Any, prompts: Sequence[str], device: torch.device) -> Texts:
        prompt, mask, _, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, device=device)
        return {"prompt": prompt, "mask": mask}

    def widths(self) -> tuple[int, int]:
        return self.source.read("text_encoder/config.json")["d_model"], self.config["caption_channels"]

    def text_shapes(self) -> Texts:
        prompt = torch.empty(1, _TOKENS, self.config["caption_channels"], device="meta")
        return {"prompt": prompt, "mask": torch.empty(1, _TOKENS, dtype=torch.int64, device="meta")}
