"""Classifier: the judge that reads generated images, and the features behind the Frechet distance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

from pydantic import NonNegativeInt
from torch import nn
from torch.nn.functional import cross_entropy

from gentrain.config import Fraction, option, register
from gentrain.data.augmented import shift_images as shift_images
from gentrain.methods.base import Batch, Clock, Loss, Method, Nets, Role, Trained, Update, weighed
from gentrain.noise import Noise


@register("classifier")
@dataclass
class ImageClassifier(Method):
    """Cross-entropy with label smoothing (arXiv:1512.00567) on randomly shifted images; logs the accuracy on them."""

    label_smoothing: Fraction = option(0.1, "share of the target spread evenly over all classes", source="arXiv:1512.00567, section 7")
    shift: NonNegativeInt = option(2, "images move by up to this much along each axis", unit="pixels")

    roles: ClassVar[dict[str, Role]] = {"classifier": Trained(denoiser=False, classifier=True)}
    weighs: ClassVar[bool] = True

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("classifier", self.loss)

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        classifier = cast(nn.Module, nets.classifier)
        x, label = batch["x"], batch["label"]
        if self.shift:
            x = shift_images(x, noise.randint(-self.shift, self.shift + 1, (len(x), 2)), self.shift)
        logits = classifier(x).float()
        accuracy = (logits.detach().argmax(1) == label).float().mean()
        loss = cross_entropy(logits, label, label_smoothing=self.label_smoothing, reduction="none")
        return Loss(weighed(loss, batch).mean(), {"accuracy": accuracy})
