"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gentrain.config import register
from gentrain.models.control import CONTROL
from gentrain.models.families.base import Family, Texts


@register("stable_diffusion")
class StableDiffusion(Family):
    """UNet2DConditionModel on 4 channels of latents, one CLIP text encoder, eps (1.x, 2.x base) or v (2.x 768).

    Latent consistency models of theirs, whose UNet reads a guidance weight, too.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    network = "UNet2DConditionModel"
    denoiser = "unet"
    time_embedding = "time_embedding"

    control_net = True

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        told = {**self.told(x, condition), **condition.get(CONTROL, {}), "timestep_cond": condition.get("guidance")}
        output: Tensor = network(x, t, **told, return_dict=False)[0]
        return output

    def steering(self, branch: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Any], control: Tensor) -> dict[str, Any]:
        down, middle = branch(x, t, controlnet_cond=control, **self.told(x, condition), return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    def told(self, x: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        """What the UNet, and a ControlNet of it, are told beside latents x [B, C, H, W] and time."""
        return {"encoder_hidden_states": condition["prompt"]}

    def texts(self, pipeline: Any, prompts: Sequence[str], device: torch.device) -> Texts:
        return {"prompt": pipeline.encode_prompt(list(prompts), device, 1, False)[0]}

    def widths(self) -> tuple[int, int]:
        encoders = [name for name in self.text_components if name.startswith("text_encoder")]
        return sum(self.source.read(f"{name}/config.json")["hidden_size"] for name in encoders), self.config["cross_attention_dim"]

    def text_shapes(self) -> Texts:
        return {"prompt": torch.empty(1, self._tokens("text_encoder"), self.config["cross_attention_dim"], device="meta")}
