"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gentrain.config import register
from gentrain.models.control import CONTROL
from gentrain.models.families.base import Family, Texts

_T5_TOKENS = 256  # the pipeline's own number
_CONTROL_BLOCKS = 12  # at most, as from_transformer of diffusers takes


@register("stable_diffusion_3")
class StableDiffusion3(Family):
    """SD3Transformer2DModel, a rectified flow on 16 channels of latents; two CLIP text encoders and T5, which may be missing."""

    pipelines = ("StableDiffusion3Pipeline",)
    network = "SD3Transformer2DModel"
    text_components = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    optional_components = ("tokenizer_3", "text_encoder_3")
    control_net = "SD3ControlNetModel"
    control_copies = ("pos_embed", "time_text_embed", "context_embedder", "transformer_blocks")
    control_is = "latents"
    scales_noise = False

    def check_shape(self, height: int, width: int) -> None:
        most = int(self.config["pos_embed_max_size"]) * int(self.config["patch_size"])
        if max(height, width) > most:
            pixels = most * self.factor
            raise ValueError(
                f"its positions end at {pixels} pixels along a side, and images have {max(height, width) * self.factor}; "
                "lower buckets.ratio or the size"
            )

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        output: Tensor = network(**self._told(x, t, condition), **condition.get(CONTROL, {}), return_dict=False)[0]
        return output

    def control_branch(self, network: Any, channels: int) -> nn.Module:
        blocks = len(network.transformer_blocks) - 1  # of the last, which gives no texts on, there can be no copy
        # the pooled texts are the pipeline's own, and the control's latents those of any image
        return self._control_branch(network, num_layers=min(blocks, _CONTROL_BLOCKS), force_zeros_for_pooled_projection=False)

    def steering(self, branch: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Any], control: Tensor) -> dict[str, Any]:
        return {"block_controlnet_hidden_states": branch(control, x.dtype, **self._told(x, t, condition))[0]}

    def _told(self, x: Tensor, t: Tensor, condition: dict[str, Any]) -> dict[str, Any]:
        texts = {"encoder_hidden_states": condition["prompt"], "pooled_projections": condition["pooled"]}
        return {"hidden_states": x, "timestep": t, **texts}

    def texts(self, pipeline: Any, prompts: Sequence[str], device: torch.device) -> Texts:
        prompt, _, pooled, _ = pipeline.encode_prompt(list(prompts), None, None, device=device, do_classifier_free_guidance=False)
        return {"prompt": prompt, "pooled": pooled}

    def widths(self) -> tuple[int, int]:
        taken: int = self.config["joint_attention_dim"]
        has_t5 = (self.source.index.get("text_encoder_3") or [None])[0] is not None
        return self.source.read("text_encoder_3/config.json")["d_model"] if has_t5 else taken, taken

    def text_shapes(self) -> Texts:
        tokens = self._tokens("text_encoder") + _T5_TOKENS  # zeros where there is no T5
        prompt = torch.empty(1, tokens, self.config["joint_attention_dim"], device="meta")
        return {"prompt": prompt, "pooled": torch.empty(1, self.config["pooled_projection_dim"], device="meta")}
