"""Direct Discriminative Optimization of autoregressive models, whose log-ratio is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat

from gentrain.config import ConfigError, option, register
from gentrain.data.pool import KnownLikelihood
from gentrain.methods.base import Batch, Nets, condition_of
from gentrain.methods.ddo import ON_THE_FLY, Ratio, SelfPlay, kept_rows
from gentrain.methods.maximum_likelihood import dropped
from gentrain.noise import Noise
from gentrain.samplers.autoregressive import Autoregressive
from gentrain.samplers.base import Sampler


@register("token_ddo")
@dataclass
class TokenDDO(SelfPlay):
    """Direct Discriminative Optimization (arXiv:2503.01103) of a token model: one round of self-play.

    As `ddo`, with log p(x) - log p_ref(x) itself, the sum over tokens, in place of an estimate from one time and noise.
    roles.reference.weights names the run that it continues.
    """

    of_tokens: ClassVar[bool] = True

    beta: PositiveFloat | str = option(
        0.02, "scale of the log-ratio, which is a SUM over the tokens; or the directory of a stage `calibrate`",
        source="arXiv:2503.01103: 0.02 for 680 tokens",
    )  # fmt: skip
    alpha: NonNegativeFloat = option(10.0, "weight of the reference's samples", source="arXiv:2503.01103: 10 to 100 for VAR")
    sampler: Sampler = option(Autoregressive, "draws from the reference on the fly")

    known: str | None = option(
        None, "directory of a stage `reference_likelihood`, which has asked the reference once of all rows; null = each step asks it"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.known is not None and self.pool == ON_THE_FLY:
            raise ConfigError("of samples drawn in each step nothing is known before; name a pool, or leave it out", key="known")

    def known_likelihood(self) -> KnownLikelihood | None:
        return None if self.known is None else KnownLikelihood(self.known, "reference", "method.known")

    def own_sampler(self) -> Sampler:
        return Autoregressive()

    def ratio(self, nets: Nets, batch: Batch, noise: Noise) -> Ratio:
        x, condition = batch["x"], dropped(batch, noise, self.label_dropout)
        log_prob = nets.model.token_log_prob(x, condition)
        kept = kept_rows(condition_of(batch), condition, log_prob)
        if "log_prob" in batch:
            reference = torch.where(kept[:, None], batch["log_prob"], batch["null_log_prob"]).to(log_prob.dtype)
        else:
            with torch.no_grad():
                reference = nets.reference.token_log_prob(x, condition)
        log_ratio = (log_prob - reference).sum(1)  # the sums are nearly equal: their difference would lose it
        return Ratio(log_ratio, -log_prob.detach().mean(1), -reference.mean(1), kept)
