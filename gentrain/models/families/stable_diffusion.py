"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gentrain.config import register
from gentrain.models.control import CONTROL
from gentrain.models.families.base import Family, Texts

_WIDTHS = (16, 32, 96, 256)  # of a ControlNet's layers that shrink the control to the latents' size, each but the first by 2


@register("stable_diffusion")
class StableDiffusion(Family):
    """UNet2DConditionModel on 4 channels of latents, one CLIP text encoder, eps (1.x, 2.x base) or v (2.x 768).

    Latent consistency models of theirs, whose UNet reads a guidance weight, too.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    network = "UNet2DConditionModel"
    denoiser = "unet"
    time_embedding = "time_embedding"
    control_net = "ControlNetModel"
    control_copies = ("conv_in", "time_embedding", "class_embedding", "add_embedding", "down_blocks", "mid_block")

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        told = {**self.told(x, condition), **condition.get(CONTROL, {}), "timestep_cond": condition.get("guidance")}
        output: Tensor = network(x, t, **told, return_dict=False)[0]
        return output

    def control_branch(self, network: Any, channels: int) -> nn.Module:
        from diffusers import ControlNetModel

        halvings = self.factor.bit_length() - 1
        if halvings >= len(_WIDTHS):
            raise ValueError(f"a ControlNet shrinks its control by at most 8, latents of this pipeline are {self.factor} times smaller")
        sizes = {"conditioning_channels": channels, "conditioning_embedding_out_channels": _WIDTHS[: halvings + 1]}
        branch: nn.Module = ControlNetModel.from_unet(network, **sizes, load_weights_from_unet=False)
        return branch

    def steering(self, branch: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Any], control: Tensor) -> dict[str, Any]:
        down, middle = branch(control, x.dtype, sample=x, timestep=t, **self.told(x, condition))
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
