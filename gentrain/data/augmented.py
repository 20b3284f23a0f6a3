"""Images that are flipped, moved and bent anew each time they are seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import NonNegativeInt
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

from gentrain.config import ConfigError, Fraction, option, register
from gentrain.data.base import Wrapped
from gentrain.noise import Noise

AUGMENTS = 9  # numbers that say what was done to an image
_SCALE = 0.2 * math.log(2)  # of the logarithm of a scale or a stretch, one deviation (arXiv:2206.00364, table 6)
_SHIFT = 0.125  # of the image's length, one deviation


def bends(probability: float, noise: Noise, count: int) -> tuple[Tensor, Tensor]:
    """EDM's geometric augmentation (arXiv:2206.00364, appendix F.2, table 6), but for its x-flip: each part with its own `probability`.

    Returns:
        matrices [B, 2, 3]: where in the original, in units of half its length from the centre, each place of the result comes from.
        labels [B, 8]: of the y-flip, scale, rotation (2), stretch (2), shift (2); 0 for parts that are not applied.
    """

    def applied(values: Tensor) -> Tensor:
        return values * noise.bernoulli(probability, (count,)).to(values).reshape(count, *(1,) * (values.ndim - 1))

    flip = applied(noise.bernoulli(0.5, (count,)).float())
    scale = applied(noise.normal((count,)))
    angle = applied(noise.uniform((count,), -math.pi, math.pi))
    axis, stretch = noise.uniform((count,), -math.pi, math.pi), applied(noise.normal((count,)))
    shift = applied(noise.normal((count, 2)))
    turned, along = _rotation(angle), _rotation(axis)
    stretched = along @ torch.diag_embed(torch.stack([(_SCALE * stretch).exp(), (-_SCALE * stretch).exp()], 1)) @ along.mT
    flipped = torch.diag_embed(torch.stack([torch.ones_like(flip), 1 - 2 * flip], 1))
    forward = stretched @ turned @ flipped * (_SCALE * scale).exp()[:, None, None]
    back = torch.linalg.inv(forward)
    matrices = torch.cat([back, -back @ (2 * _SHIFT * shift)[:, :, None]], 2)
    labels = [flip, scale, angle.cos() - 1, angle.sin(), stretch * axis.cos(), stretch * axis.sin(), shift[:, 0], shift[:, 1]]
    return matrices, torch.stack(labels, 1)


def _rotation(angle: Tensor) -> Tensor:
    """[B] -> [B, 2, 2]."""
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(-1, 2, 2)


def shift_images(x: Tensor, offset: Tensor, reach: int) -> Tensor:
    """Moves image b of x [B, C, H, W] down by offset[b, 0] and right by offset[b, 1] pixels; borders are repeated.

    Args:
        offset: [B, 2] int64 in [-reach, reach].
    """
    padded = pad(x, (reach,) * 4, mode="replicate")
    rows = reach - offset[:, :1] + torch.arange(x.shape[2], device=x.device)
    columns = reach - offset[:, 1:] + torch.arange(x.shape[3], device=x.device)
    samples = torch.arange(len(x), device=x.device)
    # the slice between index tensors moves the channels last
    return padded[samples[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


@register("augmented")
@dataclass
class Augmented(Wrapped):
    """Images of another data set, changed anew each time they are seen for training; what is held out stays as it is.

    What is drawn belongs to the place of the sample in the run, so it is the same on any number of ranks and after a stop. With `bend`, the
    network is told what was done (EDM's augmentation labels), so that samples, of which nothing is told, look like images as they are;
    pixels are read between the places of a grid bicubically, without EDM's wavelet filters.
    """

    flip: Fraction = option(0.0, "probability of a mirror image, left for right")
    crop: NonNegativeInt = option(0, "images move by up to this much along each axis; the border is repeated", unit="pixels")
    bend: Fraction = option(
        0.0, "probability of each of: upside down, larger or smaller, turned, stretched, moved", source="arXiv:2206.00364, F.2: 0.12"
    )

    def __post_init__(self) -> None:
        if not (self.flip or self.crop or self.bend):
            raise ConfigError("nothing is augmented; set flip, crop or bend, or name the data set itself", key="flip")

    @property
    def inputs(self) -> Sequence[str]:
        return [*self.data.inputs, "augment"] if self.bend else self.data.inputs

    def fit(self) -> None:
        super().fit()
        if len(self.shape) != 3 or self.data.registered_name == "latents":
            raise ValueError(f"{self.data.registered_name} has no images; what can be augmented are images")

    def augment(self, batch: dict[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        batch = self.data.augment(batch, noise)
        x, count = batch["x"], len(batch["x"])
        mirrored = noise.bernoulli(self.flip, (count,))
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        if self.crop:
            x = shift_images(x, noise.randint(-self.crop, self.crop + 1, (count, 2)), self.crop)
        if not self.bend:
            return {**batch, "x": x}
        matrices, labels = bends(self.bend, noise, count)
        grid = affine_grid(matrices.to(x), list(x.shape), align_corners=False)
        bent = grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(-1, 1)
        told = torch.cat([mirrored.to(labels)[:, None], labels], 1)
        return {**batch, "x": torch.where((labels != 0).any(1)[:, None, None, None], bent, x), "condition/augment": told}
