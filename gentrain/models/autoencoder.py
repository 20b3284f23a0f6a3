"""Image autoencoder: diffusers' AutoencoderKL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from gentrain.config import option, register
from gentrain.models.base import Model


class Coded(NamedTuple):
    """image: [B, C, H, W], what became of the images. mean, log_variance: of the latents' posterior, [B, N] with N entries of a latent."""

    image: Tensor
    mean: Tensor
    log_variance: Tensor


def unpack(output: Tensor, shape: tuple[int, ...]) -> Coded:
    """What the forward of the autoencoder gives for images of `shape` (C, H, W): engines hand on one tensor."""
    pixels = shape[0] * shape[1] * shape[2]
    mean, log_variance = output[:, pixels:].chunk(2, 1)
    return Coded(output[:, :pixels].unflatten(1, shape), mean, log_variance)


class Convolutional(Model):
    """An autoencoder of diffusers, made of levels of convolutions."""

    channels: tuple[int, ...]
    layers_per_block: int
    norm_groups: int

    def __post_init__(self) -> None:
        if not self.channels:
            raise ValueError("channels is empty; name at least one level, such as [16, 32]")
        if wrong := [width for width in self.channels if width % self.norm_groups]:
            raise ValueError(f"channels {wrong[0]} is not divisible by norm_groups {self.norm_groups}; change one of them")

    @property
    def factor(self) -> int:
        """Side of an image over that of its latent."""
        return 2 ** (len(self.channels) - 1)

    def arguments(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Of diffusers' class, for images of `shape` (C, H, W). Raises ValueError when H or W is not divisible by `factor`."""
        levels = len(self.channels)
        if shape[1] % self.factor or shape[2] % self.factor:
            raise ValueError(
                f"images of {shape[1]}x{shape[2]} pixels are not divisible by {self.factor}, 2 for each of {levels} levels but one; "
                "use fewer channels, or resize the images"
            )
        return {
            "in_channels": shape[0],
            "out_channels": shape[0],
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "block_out_channels": self.channels,
            "layers_per_block": self.layers_per_block,
            "norm_num_groups": self.norm_groups,
            "sample_size": shape[1],
            "scaling_factor": 1.0,
        }


@register("autoencoder_kl")
@dataclass
class AutoencoderKL(Convolutional):
    """Convolutional autoencoder with a Gaussian posterior of the latents (arXiv:2112.10752, section 3.1)."""

    channels: tuple[PositiveInt, ...] = option((16, 32, 64), "of each level; each level after the first halves the grid")
    latent_channels: PositiveInt = option(4, "of a latent")
    layers_per_block: PositiveInt = option(1, "residual blocks per level of the encoder, one more in the decoder")
    norm_groups: PositiveInt = option(8, "groups of the group normalisation; divides every level's channels")

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """An `Autoencoder`. Raises ValueError when shape is not (C, H, W), or H or W is not divisible by 2^(levels - 1)."""
        import diffusers

        if len(shape) != 3:
            raise ValueError(f"autoencoder_kl is for images (C, H, W), got samples of shape {shape}")
        return Autoencoder(diffusers.AutoencoderKL(**self.arguments(shape), latent_channels=self.latent_channels))


class Autoencoder(nn.Module):
    """forward: x [B, C, H, W] in [-1, 1] and eps [B, >= N] -> [B, C H W + 2 N], see `unpack`; N entries of a latent.

    Args:
        vae: diffusers' AutoencoderKL. The latent that is decoded is a draw of the posterior, with the first N numbers of a row of eps.
    """

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        posterior = self.vae.encode(x, return_dict=False)[0]  # type: ignore[operator]
        mean = posterior.mean
        if eps.shape[1] < mean[0].numel():
            raise ValueError(f"a latent has {mean[0].numel()} entries, an image {eps.shape[1]}; take fewer latent_channels or more levels")
        latent = mean + posterior.std * eps[:, : mean[0].numel()].reshape(mean.shape).to(mean.dtype)
        image = self.vae.decode(latent, return_dict=False)[0]  # type: ignore[operator]
        return torch.cat([image.flatten(1), mean.flatten(1), posterior.logvar.flatten(1)], 1)
