"""Autoencoder with a codebook: images to tokens and back, for networks that learn tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

from pydantic import NonNegativeFloat
from torch import nn

from gentrain.config import option, register
from gentrain.data.base import Data
from gentrain.methods.autoencoder import reconstruction_error
from gentrain.methods.base import Batch, Clock, Loss, Method, Nets, Role, Trained, Update
from gentrain.models.vq import unpack
from gentrain.noise import Noise


@register("vq_autoencoder")
@dataclass
class VQAutoencoder(Method):
    """Reconstruction in L1, codes that follow the encoder, and an encoder committed to its codes (arXiv:1711.00937, eq. 3).

    In place of restarting codes that nothing is nearest to, which depends on the batch of all ranks, every code is drawn a little towards
    what is nearest to it in each image: only codes without work notice.
    """

    commitment: NonNegativeFloat = option(0.25, "weight of the encoder's distance from its codes", source="arXiv:1711.00937")
    idle: NonNegativeFloat = option(0.01, "weight of every code's distance from what is nearest to it in an image; 0 = codes may lie idle")

    roles: ClassVar[dict[str, Role]] = {"autoencoder": Trained(denoiser=False, ema=True)}

    def check_data(self, data: Data) -> None:
        if len(data.shape) != 3:
            raise ValueError(f"vq_autoencoder is for images, {data.registered_name} has samples of shape {data.shape}")

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("autoencoder", self.loss)

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        x = batch["x"]
        quantized = unpack(cast(nn.Module, nets.autoencoder)(x), tuple(x.shape[1:]))
        error = reconstruction_error(quantized.image, x)
        loss = error + quantized.codebook + self.commitment * quantized.commitment + self.idle * quantized.idle
        logs = {"reconstruction": error, "quantization": quantized.codebook, "idle": quantized.idle}
        return Loss(loss.mean(), {name: value.detach().mean() for name, value in logs.items()})
