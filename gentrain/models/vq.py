"""Autoencoder with a codebook: images to tokens and back, on one grid or on growing ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.functional import embedding

from gentrain.config import option, register
from gentrain.models.autoencoder import Convolutional
from gentrain.models.tokens import narrowing, widening

SCALES = "scales.json"  # beside diffusers' own files of a VQModel


class Quantized(NamedTuple):
    """image: [B, C, H, W], what became of the images. codebook, commitment, idle: [B] each, see `quantization_errors`."""

    image: Tensor
    codebook: Tensor
    commitment: Tensor
    idle: Tensor


def unpack(output: Tensor, shape: tuple[int, ...]) -> Quantized:
    """What the forward of the autoencoder gives for images of `shape` (C, H, W): engines hand on one tensor."""
    return Quantized(output[:, :-3].unflatten(1, shape), *output[:, -3:].unbind(1))


def quantization_errors(latent: Tensor, approximations: Tensor, nearest: Tensor) -> Tensor:
    """Three means for each row, [B, 3]: squared errors that move the codes alone, the encoder alone (arXiv:1711.00937, eq. 3), idle codes.

    Args:
        latent: [B, N, D] of the encoder.
        approximations: [B, K, N, D], what the codes of the first scale, of the first two, ... make of it.
        nearest: [B, V], squared distance of each code to the nearest of all that the row's codes were to stand for, without gradient
            there: codes that nothing is nearest to come nearer by it, for want of any other gradient.
    """
    wanted = latent[:, None]
    terms = (approximations - wanted.detach()).square(), (approximations.detach() - wanted).square(), nearest
    return torch.stack([term.flatten(1).mean(1) for term in terms], 1)


def squared_distances(vectors: Tensor, codes: Tensor) -> Tensor:
    """Of each vector to each code, [B, N, D] and [V, D] -> [B, N, V], float32 or more: squares and a product hold no [B, N, V, D]."""
    work = torch.promote_types(vectors.dtype, torch.float32)
    with torch.autocast(vectors.device.type, enabled=False):  # the product in bfloat16 would lose their differences
        vectors, codes = vectors.to(work), codes.to(work)
        found: Tensor = vectors.square().sum(2, keepdim=True) - 2 * vectors @ codes.T + codes.square().sum(1)
    return found.clamp(min=0)


@register("vq")
@dataclass
class VQ(Convolutional):
    """Convolutional autoencoder whose latents are made of codes (arXiv:1711.00937): diffusers' VQModel.

    With several scales the codes of each stand for what those of the smaller ones leave (arXiv:2404.02905, algorithm 1).
    """

    channels: tuple[PositiveInt, ...] = option((32, 64, 64), "of each level; each level after the first halves the grid")
    codes: PositiveInt = option(64, "in the codebook: values of a token")
    code_dim: PositiveInt = option(8, "entries of a code")
    scales: tuple[PositiveInt, ...] = option((), "sides of the grids of codes, growing to the latent's; none = that alone")
    layers_per_block: PositiveInt = option(1, "residual blocks per level of the encoder, one more in the decoder")
    norm_groups: PositiveInt = option(8, "groups of the group normalisation; divides every level's channels")

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """A `VQNetwork`. Raises ValueError when shape is not that of square images (C, H, H) that can be halved, or scales do not fit."""
        import diffusers

        if len(shape) != 3 or shape[1] != shape[2]:
            raise ValueError(f"vq is for square images (C, H, H), got samples of shape {shape}")
        arguments, side = self.arguments(shape), shape[1] // self.factor
        if self.scales and (list(self.scales) != sorted(set(self.scales)) or self.scales[-1] != side):
            raise ValueError(f"scales {list(self.scales)} must grow and end with {side}, the side of the latent; change them")
        model = diffusers.VQModel(
            **arguments,
            latent_channels=self.code_dim,
            num_vq_embeddings=self.codes,
            mid_block_add_attention=False,  # convolutions see enough of so small a grid
        )
        nn.init.normal_(model.quantize.embedding.weight, std=0.5)  # diffusers' 1 / codes would have all latents nearest to a few
        return VQNetwork(model, self.scales or (side,))


class VQNetwork(nn.Module):
    """forward: x [B, C, H, W] in [-1, 1] -> [B, C H W + 3], see `unpack`.

    Args:
        model: diffusers' VQModel. scales: sides of the grids of codes, the last that of its latent.
    """

    def __init__(self, model: Any, scales: Sequence[int]):
        super().__init__()
        self.model, self.scales = model, tuple(scales)
        with torch.device("cpu"):
            for number, side in enumerate(self.scales):
                self.register_buffer(f"narrow_{number}", narrowing(side, self.scales[-1]), persistent=False)
                self.register_buffer(f"widen_{number}", widening(side, self.scales[-1]), persistent=False)

    @property
    def codebook(self) -> Tensor:
        """[V, D]."""
        codes = self.model.quantize.embedding
        found: Tensor = codes(torch.arange(codes.num_embeddings, device=codes.weight.device))  # a call: ZeRO-3 gathers
        return found

    def forward(self, x: Tensor) -> Tensor:
        latent = self.latent(x)
        tokens, nearest = self._chosen(latent)
        approximations = self._approximations(tokens)
        # straight through: the encoder gets the gradient of what stands in for its latent (arXiv:1711.00937, section 3.2)
        image = self._image(latent + (approximations[:, -1] - latent).detach())
        return torch.cat([image.flatten(1), quantization_errors(latent, approximations, nearest)], 1)

    def encode(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] in [-1, 1] -> tokens [B, T] int64, scale after scale, each row by row."""
        return torch.cat(self._chosen(self.latent(x))[0], 1)

    def decode(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] int64 -> images [B, C, H, W] in [-1, 1]."""
        return self._image(self._approximations(tokens.split([side**2 for side in self.scales], 1))[:, -1]).clamp(-1, 1)

    def latent(self, x: Tensor) -> Tensor:
        """[B, N, D] of images x [B, C, H, W]."""
        latent: Tensor = self.model.encode(x.to(self.model.quant_conv.weight.dtype), return_dict=False)[0]
        return latent.flatten(2).transpose(1, 2)

    def _chosen(self, latent: Tensor) -> tuple[list[Tensor], Tensor]:
        """Of each scale the codes [B, side^2] nearest to what is left of the latent; `nearest` of `Quantized`."""
        left, codebook, chosen, nearest = latent, self.codebook, [], []
        for number in range(len(self.scales)):
            wanted = getattr(self, f"narrow_{number}") @ left
            distance = squared_distances(wanted.detach(), codebook)
            chosen.append(distance.argmin(2))
            nearest.append(distance.min(1).values)
            left = left - getattr(self, f"widen_{number}") @ embedding(chosen[-1], codebook)
        return chosen, torch.stack(nearest).min(0).values

    def _approximations(self, chosen: Sequence[Tensor]) -> Tensor:
        codes = self.model.quantize.embedding
        parts = [getattr(self, f"widen_{number}") @ codes(tokens) for number, tokens in enumerate(chosen)]
        return torch.stack(parts, 1).cumsum(1)

    def _image(self, latent: Tensor) -> Tensor:
        grid = latent.transpose(1, 2).unflatten(2, (self.scales[-1],) * 2)
        image: Tensor = self.model.decode(grid, force_not_quantize=True, return_dict=False)[0]
        return image


def save_vq(network: VQNetwork, directory: Path) -> None:
    """As diffusers keeps a VQModel, and its scales."""
    network.model.save_pretrained(directory)
    (directory / SCALES).write_text(json.dumps(list(network.scales)))


def load_vq(directory: Path) -> VQNetwork:
    """What `save_vq` wrote. Raises ValueError when it is missing or damaged."""
    import diffusers

    try:
        return VQNetwork(diffusers.VQModel.from_pretrained(directory, use_safetensors=True), json.loads((directory / SCALES).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{directory} holds no autoencoder with a codebook ({type(error).__name__}); tokenize the images again") from error
