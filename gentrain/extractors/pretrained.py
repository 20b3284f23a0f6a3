"""Controls that a pretrained model of transformers reads from images: depth, segments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

from gentrain.config import errors_about, register
from gentrain.data.base import Data
from gentrain.extractors.base import Map, OfImage
from gentrain.models.control import Form
from gentrain.models.hub import fetched, files_of
from gentrain.models.image_text import FromPretrained, local_file, read_json, read_preprocessing
from gentrain.rewards.base import Networks


class _Pretrained:
    """A model that gives a number, or several, for each place of an image: held frozen in float32 on one device."""

    def __init__(self, directory: str, revision: str | None, model_class: str, device: torch.device):
        import transformers

        self.preprocessing = read_preprocessing(directory, revision)
        try:
            if not Path(directory).is_dir():
                fetched(directory, revision, *files_of())
            with torch.device("cpu"):
                self.model: Any = getattr(transformers, model_class).from_pretrained(
                    directory, revision=revision, local_files_only=True, dtype=torch.float32, use_safetensors=True
                )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ValueError(f"the model in {directory} cannot be loaded ({str(error).splitlines()[0]}); download it anew") from error
        self.model.to(device).eval().requires_grad_(False)

    def __call__(self, images: Tensor, output: str) -> Tensor:
        """Its `output` for the whole images [B, 1 or 3, H, W] in [-1, 1], K numbers at each place: [B, K, H, W]. Differentiable."""
        side, mean, std = self.preprocessing
        x = (images.float().clamp(-1, 1) + 1) / 2
        if x.shape[2:] != (side, side):
            x = interpolate(x, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        x = (x.expand(-1, 3, -1, -1) - x.new_tensor(mean).reshape(3, 1, 1)) / x.new_tensor(std).reshape(3, 1, 1)
        found: Tensor = self.model(pixel_values=x)[output]
        found = found[:, None] if found.ndim == 3 else found
        return interpolate(found, images.shape[2:], mode="bilinear", align_corners=False)


# The model belongs to the process: every copy of a configuration shares it.
_loaded = cache(_Pretrained)


@dataclass(kw_only=True)
class _OfDirectory(FromPretrained, OfImage):
    model_class: ClassVar[str]

    def check_data(self, data: Data) -> None:
        super().check_data(data)
        with errors_about("directory"):
            self._config()
            self.form(tuple(data.shape))

    def _config(self) -> dict[str, Any]:
        return read_json(local_file(self.directory, self.revision, "config.json"))

    def found(self, x: Tensor, output: str) -> Tensor:
        return _loaded(self.directory, self.revision, self.model_class, x.device)(x, output)


@register("depth")
@dataclass(kw_only=True)
class Depth(_OfDirectory, Map):
    """What a model such as DPT or Depth Anything finds of depth or its inverse, in each image from 0 to 1: [1, H, W]."""

    model_class: ClassVar[str] = "AutoModelForDepthEstimation"

    def form(self, shape: tuple[int, ...]) -> Form:
        return Form((1, *shape[1:]))

    def read(self, x: Tensor, networks: Networks) -> Tensor:
        depth = self.found(x, "predicted_depth")
        low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
        return (depth - low) / (high - low + 1e-6)


@register("segmentation")
@dataclass(kw_only=True)
class Segmentation(_OfDirectory):
    """The class that a model such as SegFormer finds at each pixel, one channel for each: [classes, H, W]; p(c | x) is what it finds."""

    model_class: ClassVar[str] = "AutoModelForSemanticSegmentation"
    error_is: ClassVar[str] = "share of pixels read as another class than asked for"

    def form(self, shape: tuple[int, ...]) -> Form:
        """Raises ValueError when the model's configuration names no classes."""
        classes = self._config().get("id2label")
        if not isinstance(classes, dict):
            raise ValueError(f"{self.directory} names no classes; take a model for semantic segmentation")
        return Form((len(classes), *shape[1:]))

    def read(self, x: Tensor, networks: Networks) -> Tensor:
        logits = self.found(x, "logits")
        return one_hot(logits.argmax(1), logits.shape[1]).movedim(3, 1).to(logits)

    def loss(self, control: Tensor, x: Tensor, networks: Networks) -> Tensor:
        return -(control * self.found(x, "logits").log_softmax(1)).flatten(1).sum(1)

    def error(self, control: Tensor, x: Tensor, networks: Networks) -> Tensor:
        return (control - self.read(x, networks)).abs().sum(1).flatten(1).mean(1) / 2
