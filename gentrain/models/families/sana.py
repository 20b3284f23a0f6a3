"""Sana."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gentrain.config import register
from gentrain.models.control import CONTROL
from gentrain.models.families.base import Family, Texts

_TOKENS = 300  # the pipeline's own number
_CONTROL_BLOCKS = 7  # at most, the default of diffusers


@register("sana")
class Sana(Family):
    """SanaTransformer2DModel, a rectified flow on the latents of a deep-compression autoencoder, with Gemma.

    Prompts are preceded by the pipeline's own instruction to Gemma, the empty one is not.
    """

    pipelines = ("SanaPipeline",)
    network = "SanaTransformer2DModel"
    control_net = "SanaControlNetModel"
    control_copies = ("patch_embed", "time_embed", "caption_projection", "caption_norm", "transformer_blocks")
    control_is = "latents"
    scales_noise = False
    call_settings = "use_resolution_binning=False, "

    @property
    def factor(self) -> int:
        return int(2 ** (len(self.vae_config["encoder_block_out_channels"]) - 1))

    def posterior(self, vae: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        latents: Tensor = vae.encode(images).latent * self.vae_config["scaling_factor"]  # type: ignore[operator]
        return latents, torch.zeros_like(latents)

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        output: Tensor = network(**self._told(x, t, condition), **condition.get(CONTROL, {}), return_dict=False)[0]
        return output

    def control_branch(self, network: Any, channels: int) -> nn.Module:
        if self.config["timestep_scale"] != 1:
            raise ValueError(f"diffusers' SanaControlNetPipeline knows no timestep_scale, which {self.source.name} has; name another")
        return self._control_branch(network, num_layers=min(len(network.transformer_blocks) - 1, _CONTROL_BLOCKS))

    def steering(self, branch: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Any], control: Tensor) -> dict[str, Any]:
        return {"controlnet_block_samples": branch(control, x.dtype, **self._told(x, t, condition))[0]}

    def _told(self, x: Tensor, t: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        texts = {"encoder_hidden_states": condition["prompt"], "encoder_attention_mask": condition["mask"]}
        return {"hidden_states": x, "timestep": t * self.config["timestep_scale"], **texts}

    def texts(self, pipeline: Any, prompts: Sequence[str], device: torch.device) -> Texts:
        return self._texts(pipeline, prompts, device, inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default)

    def null(self, pipeline: Any, prompt: str, device: torch.device) -> Texts:
        return self._texts(pipeline, [prompt], device, None)

    def _texts(self, pipeline: Any, prompts: Sequence[str], device: torch.device, instruction: list[str] | None) -> Texts:
        prompt, mask, _, _ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=device, complex_human_instruction=instruction
        )
        return {"prompt": prompt, "mask": mask}

    def widths(self) -> tuple[int, int]:
        return self.source.read("text_encoder/config.json")["hidden_size"], self.config["caption_channels"]

    def text_shapes(self) -> Texts:
        prompt = torch.empty(1, _TOKENS, self.config["caption_channels"], device="meta")
        return {"prompt": prompt, "mask": torch.empty(1, _TOKENS, dtype=torch.int64, device="meta")}
