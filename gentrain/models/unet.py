"""UNet with residual blocks and self-attention: diffusers' UNet2DModel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from gentrain.config import option, register
from gentrain.models.base import Model
from gentrain.models.conditional import ConditionalNetwork
from gentrain.models.inputs import TIME_SCALE


@register("unet")
@dataclass
class UNet(Model):
    """UNet for images (Ho et al. 2020, arXiv:2006.11239, appendix B), class embedding added to the time embedding."""

    channels: tuple[PositiveInt, ...] = option((32, 64), "channels of each level; each level after the first halves the grid")
    layers_per_block: PositiveInt = option(1, "residual blocks per level on the way down, one more on the way up")
    attention: tuple[NonNegativeInt, ...] = option((1,), "levels with self-attention, counted from 0; the last one's includes the middle")
    attention_head_dim: PositiveInt = option(32, "channels per attention head")
    norm_groups: PositiveInt = option(8, "groups of the group normalisation; divides every level's channels")
    space_to_depth: PositiveInt = option(1, "the network sees blocks of this many pixels squared as channels", unit="pixels")
    time_scale: PositiveFloat = option(1.0, TIME_SCALE)

    def __post_init__(self) -> None:
        if not self.channels:
            raise ValueError("channels is empty; name at least one level, such as [32, 64]")
        if wrong := [level for level in self.attention if level >= len(self.channels)]:
            raise ValueError(f"attention names level {wrong[0]}, but channels has levels 0 to {len(self.channels) - 1}")
        for what, divisor in (("norm_groups", self.norm_groups), ("attention_head_dim", self.attention_head_dim)):
            touched = self.channels if what == "norm_groups" else [self.channels[level] for level in self.attention]
            if wrong := [width for width in touched if width % divisor]:
                raise ValueError(f"channels {wrong[0]} is not divisible by {what} {divisor}; change one of them")

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """A `ConditionalNetwork`; without label embedding where num_classes is 0.

        Raises:
            ValueError: shape is not (C, H, W), or H or W is not divisible by space_to_depth * 2^(levels - 1).
        """
        from diffusers import UNet2DModel

        self.check_shapes([shape])
        channels, height, width = shape
        levels = ["Attn" if level in self.attention else "" for level in range(len(self.channels))]
        backbone = UNet2DModel(
            sample_size=(height // self.space_to_depth, width // self.space_to_depth),
            in_channels=channels * self.space_to_depth**2,
            out_channels=channels * self.space_to_depth**2,
            block_out_channels=self.channels,
            layers_per_block=self.layers_per_block,
            down_block_types=tuple(f"{level}DownBlock2D" for level in levels),
            up_block_types=tuple(f"{level}UpBlock2D" for level in reversed(levels)),
            add_attention=levels[-1] != "",
            attention_head_dim=self.attention_head_dim,
            norm_num_groups=self.norm_groups,
            num_class_embeds=num_classes + 1 if num_classes else None,
        )
        return ConditionalNetwork(backbone, num_classes or None, self.space_to_depth, self.time_scale)

    def check_shapes(self, shapes: Sequence[tuple[int, ...]]) -> None:
        factor = self.space_to_depth * 2 ** (len(self.channels) - 1)
        for shape in shapes:
            if len(shape) != 3:
                raise ValueError(f"unet is for images (C, H, W), got samples of shape {shape}; use mlp for vectors")
            _, height, width = shape
            if height % factor or width % factor:
                raise ValueError(
                    f"images of {height}x{width} pixels are not divisible by {factor} = space_to_depth {self.space_to_depth} times 2 for "
                    f"each of {len(self.channels)} levels but one; use fewer channels or a smaller space_to_depth, or resize the images"
                )
