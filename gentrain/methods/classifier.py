"""Classifier: the judge that reads generated images, and the features behind the Frechet distance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from gentrain.config import Fraction, option, register
from gentrain.methods.base import Batch, Clock, Loss, Method, Nets, Role, Trained, Update
from gentrain.noise import Noise


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


@register("classifier")
@dataclass
class ImageClassifier(Method):
    """Cross-entropy with label smoothing (arXiv:1512.00567) on randomly shifted images; logs the accuracy on them."""

    label_smoothing: Fraction = option(0.1, "share of the target spread evenly over all classes", source="arXiv:1512.00567, section 7")
    shift: NonNegativeInt = option(2, "images move by up to this much along each axis", unit="pixels")

    roles: ClassVar[dict[str, Role]] = {"classifier": Trained(denoiser=False, classifier=True)}

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("classifier", self.loss)

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        classifier = cast(nn.Module, nets.classifier)
        x, label = batch["x"], batch["label"]
        if self.shift:
            x = shift_images(x, noise.randint(-self.shift, self.shift + 1, (len(x), 2)), self.shift)
        logits = classifier(x).float()
        accuracy = (logits.detach().argmax(1) == label).float().mean()
        return Loss(cross_entropy(logits, label, label_smoothing=self.label_smoothing), {"accuracy": accuracy})
