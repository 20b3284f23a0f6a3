"""Diffusion transformer: diffusers' DiTTransformer2DModel."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import PositiveFloat, PositiveInt
from torch import nn

from gentrain.config import option, register
from gentrain.models.base import Model
from gentrain.models.conditional import ConditionalNetwork
from gentrain.models.inputs import TIME_SCALE


@register("dit")
@dataclass
class DiT(Model):
    """Diffusion transformer with adaLN-Zero conditioning (Peebles and Xie 2023, arXiv:2212.09748) for square images."""

    layers: PositiveInt = option(6, "transformer blocks")
    heads: PositiveInt = option(4, "attention heads")
    head_dim: PositiveInt = option(32, "channels per head; the width is heads * head_dim")
    patch_size: PositiveInt = option(2, "side of a patch", unit="pixels")
    time_scale: PositiveFloat = option(1.0, TIME_SCALE)

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """A `ConditionalNetwork`.

        Raises:
            ValueError: shape is not that of a square image (C, H, H) with H divisible by patch_size.
        """
        from diffusers import DiTTransformer2DModel

        if len(shape) != 3 or shape[1] != shape[2]:
            raise ValueError(f"dit is for square images (C, H, H), got samples of shape {shape}; crop them, or use unet (mlp for vectors)")
        if shape[1] % self.patch_size:
            raise ValueError(f"images of {shape[1]} pixels are not divisible by patch_size {self.patch_size}; choose a divisor")
        backbone = DiTTransformer2DModel(
            num_attention_heads=self.heads,
            attention_head_dim=self.head_dim,
            in_channels=shape[0],
            num_layers=self.layers,
            sample_size=shape[1],
            patch_size=self.patch_size,
            num_embeds_ada_norm=num_classes,
        )
        # diffusers builds this class for pretrained weights: the zeros that make adaLN-Zero are missing
        zeroed = [block.norm1.linear for block in backbone.transformer_blocks] + [backbone.proj_out_1, backbone.proj_out_2]
        for linear in zeroed:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for block in backbone.transformer_blocks:
            # methods drop labels, from the noise of each sample; the model's own dropping would draw from torch's generator
            block.norm1.emb.class_embedder.dropout_prob = 0.0
        return ConditionalNetwork(backbone, num_classes, time_scale=self.time_scale)
