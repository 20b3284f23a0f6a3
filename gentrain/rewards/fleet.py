"""A reward on several processes, given by the package that knows of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from gentrain.config import ConfigError, errors_about, option, register
from gentrain.data.base import Data
from gentrain.rewards.base import Asked, Networks, Reward


@register("fleet")
@dataclass
class Fleet(Reward):
    """A slow reward, a black box or a service, on Ray actors: a call's batches are scored at the same time.

    A batch whose actor dies, or has not answered in time, goes to another actor. Each rank has a fleet of its own, in the Ray cluster
    that it is part of (RAY_ADDRESS), else in a session that it starts. Scores are those of the reward itself; there is no gradient.
    """

    differentiable: ClassVar[bool] = False
    range: ClassVar[tuple[float, float]] = (-float("inf"), float("inf"))
    licence: ClassVar[str] = "that of the reward"
    needs: ClassVar[str] = "what the reward needs, on every machine of the Ray cluster"

    reward: Reward = option(help="what scores; one that reads no networks of the method")
    actors: PositiveInt = option(2, "processes of each rank, at most one for each core of the cluster")
    batch: PositiveInt = option(16, "images of a call to an actor")
    timeout_s: PositiveFloat = option(60.0, "for a call, from when its actor takes it", unit="s")
    retries: NonNegativeInt = option(3, "of a batch")
    max_mib: PositiveInt = option(256, "of the images that are under way", unit="MiB")

    opener: ClassVar[Callable[..., Any] | None] = None  # makes what `cluster.rewards.RewardFleet` is; set there

    def __post_init__(self) -> None:
        if roles := list(self.reward.networks()):
            name = self.reward.registered_name
            raise ConfigError(f"{name} reads the network {roles[0]!r} of the method, which actors do not hold; take it alone", key="reward")
        self._fleet: Any = None

    def check_data(self, data: Data) -> None:
        with errors_about("reward"):
            self.reward.check_data(data)
        self._data = data

    def __call__(self, images: Tensor, asked: Asked, networks: Networks) -> Tensor:
        if self._fleet is None:
            if self.opener is None:
                raise RuntimeError("nobody has given actors; import gentrain.cluster.rewards first")
            self._fleet = self.opener(
                self.reward, self._data, self.actors, self.batch, self.timeout_s, self.retries, self.max_mib << 20, cores=0.0
            )
        scores: Tensor = self._fleet(images.detach(), asked)
        return scores.to(device=images.device, dtype=torch.float32)
