"""A reward model learnt from pairs of which one was preferred."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data
from gentrain.data.preferences import Preferences
from gentrain.methods.base import Batch, Clock, Loss, Method, Nets, Role, Trained, Update, condition_of, part_of
from gentrain.models.towers import matches, unpack
from gentrain.noise import Noise
from gentrain.rewards.reading import Read, read_scalar


def davidson_log_likelihood(first: Tensor, second: Tensor, votes: Tensor, ties: float) -> Tensor:
    """Log-likelihood of the votes on each pair: rewards [B] and [B], votes [B, 3] for first, second, neither -> [B].

    Davidson (1970), doi:10.1080/01621459.1970.10481082, eq. 2.3: with p = exp(reward), the chances are as p : p' : ties sqrt(p p').
    Between equals a tie has the chance ties / (2 + ties). ties = 0 is Bradley and Terry's model, in which a tie counts as half a vote for
    either.
    """
    half = (first - second) / 2
    if ties == 0:
        votes = torch.stack([votes[:, 0] + votes[:, 2] / 2, votes[:, 1] + votes[:, 2] / 2], 1)
        logits = torch.stack([half, -half], 1)
    else:
        logits = torch.stack([half, -half, torch.full_like(half, math.log(ties))], 1)
    return (votes.to(logits) * logits.log_softmax(1)).sum(1)


@register("preference_reward")
@dataclass
class PreferenceReward(Method):
    """A network whose scalar reading predicts which of two samples annotators prefer, for the reward `learned` or a role `proxy`.

    Any backbone will do: a network that classifies is read at the class asked for, one for denoising by the mean of its output, towers by
    how well an image matches the prompt (so PickScore was made, arXiv:2305.01569). Differences alone are learnt, per condition: no reward
    of one can be compared with another's.
    """

    read: Literal[Read, "match"] = option(
        "class_logit", "how the network becomes a number: see rewards.reading; match = towers, which compare both images with their prompt"
    )
    ties: NonNegativeFloat = option(
        0.0, "odds of a tie between equals, halved (Davidson's nu); 0 = Bradley-Terry, a tie being half a vote each",
        source="doi:10.1080/01621459.1970.10481082",
    )  # fmt: skip
    centring: NonNegativeFloat = option(0.0, "weight of the mean square of the rewards' sum: keeps them near 0", source="arXiv:2312.09244")

    def __post_init__(self) -> None:
        roles: dict[str, Role] = {"reward_model": Trained(denoiser=False, classifier=self.read == "class_logit", ema=True)}
        vars(self)["roles"] = roles  # how the network is read is part of the configuration

    def check_data(self, data: Data) -> None:
        if not isinstance(data, Preferences):
            raise ValueError(f"preference_reward learns from pairs, which {data.registered_name} has not; take the data set preferences")
        if self.read == "match" and data.prompts is None:
            raise ConfigError("match compares images with prompts, of which data.prompts names none", key="read")

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("reward_model", self.loss)

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        rejected, votes = part_of(batch, "rejected"), batch["votes"]
        both = torch.cat([batch["x"], rejected["x"]])
        if self.read == "match":
            values = matches(unpack(nets.reward_model(both, torch.cat([batch["tokens"]] * 2))))  # b cancels
        else:
            condition, other = condition_of(batch), condition_of(rejected)
            asked = (
                None if condition is None or other is None else {key: torch.cat([value, other[key]]) for key, value in condition.items()}
            )
            values = read_scalar(self.read, nets.reward_model, both, asked)
        first, second = values.chunk(2)
        loss = -davidson_log_likelihood(first, second, votes, self.ties).mean() + self.centring * (first + second).square().mean()
        margin, majority = (first - second).detach(), (votes[:, 0] - votes[:, 1]).sign()
        logs = {"margin": (margin * majority).mean(), "accuracy": (1 + (margin.sign() * majority).mean()) / 2}
        return Loss(loss, logs)
