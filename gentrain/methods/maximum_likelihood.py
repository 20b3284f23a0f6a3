"""Maximum likelihood of token models: what an autoregressive model is trained by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from gentrain.config import Fraction, option, register
from gentrain.methods.base import Batch, Clock, Loss, Method, Nets, Role, Trained, Update, condition_of
from gentrain.models.base import Condition
from gentrain.models.denoiser import drop_condition
from gentrain.noise import Noise
from gentrain.samplers.autoregressive import Autoregressive
from gentrain.samplers.base import Sampler


def dropped(batch: Batch, noise: Noise, label_dropout: float) -> Condition | None:
    """The batch's condition, in which labels become the null class with probability `label_dropout`."""
    condition = condition_of(batch)
    return None if condition is None else drop_condition(condition, noise.bernoulli(label_dropout, (len(batch["x"]),)))


@register("maximum_likelihood")
@dataclass
class MaximumLikelihood(Method):
    """The mean of -log p(x | label) per token, teacher forced: next token, or next scale (arXiv:2404.02905)."""

    roles: ClassVar[dict[str, Role]] = {"model": Trained(ema=True)}
    generator: ClassVar[str | None] = "model"
    of_tokens: ClassVar[bool] = True

    label_dropout: Fraction = option(0.1, "probability that a label becomes the null class", source="arXiv:2207.12598")

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("model", self.loss)

    def own_sampler(self) -> Sampler:
        return Autoregressive()

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        x = batch["x"]
        return Loss(-nets.model.log_prob(x, dropped(batch, noise, self.label_dropout)).mean() / x.shape[1])
