"""Several rewards together: weighted, or as an ensemble whose disagreement is held against the sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from gentrain.config import ConfigError, errors_about, option, register
from gentrain.data.base import Data
from gentrain.rewards.base import Asked, Judge, Networks, Reward

Kind = Literal["mean", "worst_case", "uncertainty_weighted"]


def normalise(scores: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(scores - mean) / std of each member: scores [members, B], mean and std [members], std > 0."""
    return (scores - mean[:, None]) / std[:, None]


def aggregate(scores: Tensor, kind: Kind, weight: float = 0.5, unbiased: bool = True) -> Tensor:
    """The reward of an ensemble (arXiv:2310.02743, section 4): scores [members, B] -> [B].

    mean: their mean. worst_case: the least of them, eq. 2. uncertainty_weighted: mean - weight * variance over the members, eq. 3, the
    variance divided by members - 1 (`unbiased`: 0 for one member) or by members.

    The gradient of worst_case is that of the least member alone. That of uncertainty_weighted weighs member i by
    1 / k - 2 weight (r_i - mean) / (k - 1): one far above the others is pushed DOWN.
    """
    if kind == "mean":
        return scores.mean(0)
    if kind == "worst_case":
        return scores.min(0).values
    deviation = (scores - scores.mean(0)).square().sum(0)
    return scores.mean(0) - weight * deviation / max(len(scores) - unbiased, 1)


class _Several(Reward):
    """Base of rewards made of others."""

    needs: ClassVar[str] = "what its parts need"
    licence: ClassVar[str] = "that of its parts"
    range: ClassVar[tuple[float, float]] = (-float("inf"), float("inf"))
    key: ClassVar[str]  # where the configuration has the part {}

    def parts(self) -> dict[str, Reward]:
        raise NotImplementedError

    def __post_init__(self) -> None:
        parts = self.parts()
        if not parts:
            raise ValueError("name at least one reward")
        vars(self)["differentiable"] = all(part.differentiable for part in parts.values())
        self.networks()

    def networks(self) -> dict[str, Judge]:
        found: dict[str, Judge] = {}
        for name, part in self.parts().items():
            for role, judge in part.networks().items():
                if found.setdefault(role, judge) != judge:
                    raise ConfigError(
                        f"another part reads the role {role!r} in another way; give `role` another name", key=self.key.format(name)
                    )
        return found

    def check_data(self, data: Data) -> None:
        for name, part in self.parts().items():
            with errors_about(self.key.format(name)):
                part.check_data(data)

    def _scores(self, images: Tensor, asked: Asked, networks: Networks) -> Tensor:
        """[parts, B]."""
        return torch.stack([part(images, asked, networks) for part in self.parts().values()])


@dataclass
class Weighted:
    """A reward and its weight in a sum."""

    reward: Reward = option(help="what is added")
    weight: float = option(1.0, "its factor; negative = to be avoided")


@register("sum")
@dataclass
class Sum(_Several):
    """Several rewards, each times its weight, added up. The weights make one unit of what the rewards measure in different ones."""

    key: ClassVar[str] = "rewards.{}.reward"

    rewards: dict[str, Weighted] = option(help="name -> reward and weight")

    def parts(self) -> dict[str, Reward]:
        return {name: part.reward for name, part in self.rewards.items()}

    def __call__(self, images: Tensor, asked: Asked, networks: Networks) -> Tensor:
        scores = self._scores(images, asked, networks)
        return scores.new_tensor([part.weight for part in self.rewards.values()]) @ scores


@dataclass
class Member:
    """A reward of an ensemble, brought to the scale of the others."""

    reward: Reward = option(help="the member")
    mean: float = option(0.0, "of its scores on samples of the model before: subtracted")
    std: NonNegativeFloat = option(1.0, "of its scores on the same samples: divided by")

    def __post_init__(self) -> None:
        if self.std == 0:
            raise ConfigError("a member whose scores do not differ says nothing; leave it out", key="std")


@register("ensemble")
@dataclass
class Ensemble(_Several):
    """Rewards that should agree (arXiv:2310.02743), each normalised by its own mean and deviation, see `aggregate`."""

    key: ClassVar[str] = "members.{}.reward"

    members: dict[str, Member] = option(help="name -> reward, mean and std")
    combine: Kind = option("uncertainty_weighted", "mean, the worst case, or the mean less the weighted variance")
    weight: NonNegativeFloat = option(0.5, "of the variance", source="arXiv:2310.02743, best-of-n; 0.1 under PPO")
    unbiased: bool = option(True, "the variance is divided by members - 1, as torch.var does; false: by members, as numpy.var does")

    def parts(self) -> dict[str, Reward]:
        return {name: member.reward for name, member in self.members.items()}

    def __call__(self, images: Tensor, asked: Asked, networks: Networks) -> Tensor:
        scores = self._scores(images, asked, networks)
        mean, std = (scores.new_tensor([getattr(member, key) for member in self.members.values()]) for key in ("mean", "std"))
        return aggregate(normalise(scores, mean, std), self.combine, self.weight, self.unbiased)
