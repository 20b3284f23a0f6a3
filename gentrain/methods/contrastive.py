"""Contrastive training of an image and a text tower."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data
from gentrain.methods.base import Batch, Clock, Group, Loss, Method, Nets, Role, Trained, Update
from gentrain.methods.classifier import shift_images
from gentrain.methods.contrastive_loss import Exchange, sigmoid_contrastive_loss, softmax_contrastive_loss
from gentrain.metrics.retrieval import retrieval
from gentrain.models.base import Codec
from gentrain.models.towers import Embeddings, embedded, locked_side, unpack
from gentrain.noise import Noise

__all__ = ["Contrastive", "same_caption", "sigmoid_contrastive_loss", "softmax_contrastive_loss"]


def same_caption(caption: Tensor, group: Group) -> Tensor:
    """1 where a caption of this rank [B] is that of a pair of any rank, else -1: [B, B * ranks] int8."""
    return (caption[:, None] == group.gather(caption)).to(torch.int8).mul_(2).sub_(1)


@register("contrastive")
@dataclass
class Contrastive(Method):
    """Sigmoid loss for language-image pre-training, or the softmax loss of CLIP, of all pairs in a batch.

    The negatives of a pair are those of its batch on all ranks, but of one micro-batch: leave training.micro_batches at 1 and set the
    model's rows_at_once where the towers do not fit. Logs the share of images whose own text is the nearest of this rank's.
    """

    loss: Literal["sigmoid", "softmax"] = option("sigmoid", "of the pairs")
    exchange: Exchange = option("two_way_ring", "how texts reach other ranks, for the sigmoid loss; gather holds those of all ranks")
    chunk_size: PositiveInt | None = option(None, "rows whose logits are computed at once; null = as many as make 4 MiB")
    repeats: Literal["match", "negative"] = option(
        "match", "what pairs of one caption are to each other, for the sigmoid loss; match holds a byte for each pair of the rank's rows"
    )
    shift: NonNegativeInt = option(2, "images move by up to this much along each axis", unit="pixels")
    examined: NonNegativeInt = option(
        0, "held-out pairs, at most, of which each line of metrics tells retrieval and zero-shot classification; 0 = none", unit="pairs"
    )

    roles: ClassVar[dict[str, Role]] = {"towers": Trained(denoiser=False)}

    def __post_init__(self) -> None:
        if 0 < self.examined < 5:
            raise ConfigError(f"expected 0 or at least 5, which recall @5 ranks, got {self.examined}", key="examined")

    def check_data(self, data: Data) -> None:
        if len(data.shape) != 3:
            raise ValueError(f"contrastive is for images with captions, {data.registered_name} has samples of shape {data.shape}")

    @property
    def held_out(self) -> int:
        return self.examined

    def examine(self, network: nn.Module, batch: Batch, codec: Codec) -> dict[str, float]:
        texts = {"caption": torch.arange(len(codec.data.captions))}
        image, text = embedded(network, batch["x"], codec.encode(texts, Noise(0, texts["caption"]))["tokens"])
        return {f"held_out/{metric.name}": metric.value for metric in retrieval(image, text, batch["caption"])}

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("towers", self.pair_loss)

    def pair_loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        if "tokens" not in batch:
            raise ConfigError("contrastive trains an image and a text tower; set model: towers", key="model")
        towers, x = cast(nn.Module, nets.towers), batch["x"]
        if self.shift:
            x = shift_images(x, noise.randint(-self.shift, self.shift + 1, (len(x), 2)), self.shift)
        embeddings = unpack(towers(x, batch["tokens"]), locked_side(batch))
        logs = _logs(embeddings, batch["caption"])
        if self.loss == "softmax":
            value = softmax_contrastive_loss(*embeddings[:3], nets.group, self.chunk_size)
        else:
            if not embeddings.image.requires_grad:  # then images travel: captions match both ways
                embeddings = embeddings._replace(image=embeddings.text, text=embeddings.image)
            labels = same_caption(batch["caption"], nets.group) if self.repeats == "match" else None
            value = sigmoid_contrastive_loss(*embeddings, labels, nets.group, self.chunk_size, self.exchange)
        return Loss(value, logs)


def _logs(embeddings: Embeddings, caption: Tensor) -> dict[str, Tensor]:
    image, text = (nn.functional.normalize(side.detach(), dim=1) for side in embeddings[:2])
    nearest = (image @ text.T).argmax(1)
    hits = caption[nearest] == caption
    scalars = {"logit_scale": embeddings.logit_scale, "logit_bias": embeddings.logit_bias}
    return {"top1": hits.float().mean(), **{name: value.detach().squeeze() for name, value in scalars.items()}}
