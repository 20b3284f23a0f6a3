"""Controls that are formulas of the pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad, softplus

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data
from gentrain.extractors.base import Extractor, Map
from gentrain.models.control import Form
from gentrain.rewards.base import Networks

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def grey(images: Tensor) -> Tensor:
    """[B, C, H, W] in [-1, 1], C = 1 or 3 -> luma [B, 1, H, W] in [0, 1]."""
    luma = images if images.shape[1] == 1 else (images * images.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
    return (luma + 1) / 2


@register("down_sampling")
@dataclass
class DownSampling(Map):
    """The image in blocks of their mean colour, in [0, 1]: a control of super-resolution."""

    factor: Annotated[int, Field(ge=2)] = option(4, "side of a block", unit="pixels")

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if shape[1] % self.factor or shape[2] % self.factor:
            raise ConfigError(f"images of {shape[1]}x{shape[2]} pixels are no multiples of it; take a divisor", key="factor")

    def form(self, shape: tuple[int, ...]) -> Form:
        return Form(shape)

    def read(self, x: Tensor, networks: Networks) -> Tensor:
        small = avg_pool2d((x + 1) / 2, self.factor)
        return small.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)


@register("grey_scale")
@dataclass
class GreyScale(Map):
    """The luma of a colour image, in [0, 1]: a control of colouring."""

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if shape[0] == 1:
            raise ValueError("the images are grey themselves; take colour images")

    def form(self, shape: tuple[int, ...]) -> Form:
        return Form((1, *shape[1:]))

    def read(self, x: Tensor, networks: Networks) -> Tensor:
        return grey(x)


@register("soft_edges")
@dataclass
class SoftEdges(Map):
    """Strength of the edges in [0, 1), m / (m + softness) of Sobel's gradient m of the grey values in [0, 1]; smooth, unlike Canny's."""

    softness: PositiveFloat = option(0.25, "gradient at which an edge has strength 1/2", unit="of the step from black to white")

    def form(self, shape: tuple[int, ...]) -> Form:
        return Form((1, *shape[1:]))

    def read(self, x: Tensor, networks: Networks) -> Tensor:
        slope = x.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
        kernels = torch.stack([slope, slope.T])[:, None]
        gradient = conv2d(pad(grey(x), (1, 1, 1, 1), mode="replicate"), kernels)
        # the least gradient keeps the root's slope finite where an image is flat
        strength = (gradient.square().sum(1, keepdim=True) + 1e-6).sqrt()
        return strength / (strength + self.softness)


@register("signs")
@dataclass
class Signs(Extractor):
    """The sign of each coordinate of vectors, in the plane their quadrant; p(c | x) = product of 1 / (1 + exp(-c x / softness))."""

    error_is: ClassVar[str] = "share of samples with a sign other than asked for"

    softness: PositiveFloat = option(0.1, "coordinate at which a sign is right with odds of e to 1")

    def check_data(self, data: Data) -> None:
        if len(data.shape) != 1:
            raise ValueError(f"signs is for vectors, {data.registered_name} has samples of shape {data.shape}")

    def form(self, shape: tuple[int, ...]) -> Form:
        return Form(shape)

    def read(self, x: Tensor, networks: Networks) -> Tensor:
        return torch.where(x < 0, -1.0, 1.0)

    def loss(self, control: Tensor, x: Tensor, networks: Networks) -> Tensor:
        return softplus(-control * x / self.softness).sum(1)

    def error(self, control: Tensor, x: Tensor, networks: Networks) -> Tensor:
        return (self.read(x, networks) != control).any(1).float()
