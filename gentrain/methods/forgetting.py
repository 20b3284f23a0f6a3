"""What the methods that make a model forget share: which class or concepts, and what is asked for in their place and of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gentrain.config import ConfigError, option
from gentrain.data.base import Data
from gentrain.data.concepts import FORGET, Concepts
from gentrain.methods.base import Batch, Method, condition_of, part_of
from gentrain.models.base import Condition
from gentrain.noise import Noise

UNIFORM = "uniform"


def class_number(given: int | str, names: Sequence[str]) -> int:
    """The number of a class given by number or by name. Raises ValueError that tells the classes."""
    known = f"the classes are {', '.join(names)} (0 to {len(names) - 1})" if len(names) else "these data have no classes"
    if isinstance(given, str):
        if given in names:
            return list(names).index(given)
        raise ValueError(f"no class is called {given!r}; {known}")
    if not 0 <= given < len(names):
        raise ValueError(f"there is no class {given}; {known}")
    return given


def override_weights(override: int | str, names: Sequence[str], forgotten: int, words: str = UNIFORM) -> Tensor:
    """[K] weights of the classes that stand in for the forgotten one: the one named, or all others alike for `uniform`.

    words: what may stand in place of a class, for the error. Raises ConfigError.
    """
    if override == UNIFORM:
        others = torch.ones(len(names), dtype=torch.float64)
        others[forgotten] = 0
        return others
    try:
        place = class_number(override, names)
    except ValueError as error:
        raise ConfigError(f"{error}; or take {words}", key="override") from error
    if place == forgotten:
        raise ConfigError("it is the class to forget; name another one, or uniform", key="override")
    return torch.nn.functional.one_hot(torch.tensor(place), len(names)).double()


def draw_classes(noise: Noise, count: int, weights: Tensor) -> Tensor:
    """[count] int64 classes, each with the probability weights[k] / sum(weights); weights [K] >= 0, on any device, not all 0.

    One uniform number per row through the inverse of the distribution function, so that a class of weight 0 is never drawn.
    """
    cumulative = weights.double().cumsum(0)
    return torch.searchsorted((cumulative / cumulative[-1]).to(noise.rows.device), noise.uniform((count,)).double(), right=True)


@dataclass
class Forgetting(Method):
    """Base of the methods that forget one class, or the concepts of the data set `concepts`.

    Attributes:
        takes_concepts: the method learns from prompts alone.
        told: what is forgotten, in words.
        prompted: the data are `concepts`: rows hold the prompts, and no class is named.
        forgotten: its number. remaining: [K] weights of the labels that are drawn for the other classes, 0 for the forgotten one.
            All are known once `check_data` has been called, the last two where a class is forgotten.
    """

    takes_concepts: ClassVar[bool] = False

    forget: int | str | None = option(None, "the class to forget, by number or name; null with the data set `concepts`, which name them")
    prior: list[float] | None = option(None, "weight of each class among the labels drawn for the others; null = all the same")

    def check_data(self, data: Data) -> None:
        self.prompted = isinstance(data, Concepts)
        if isinstance(data, Concepts):
            if not self.takes_concepts:
                raise ValueError(f"{self.registered_name} learns from images and their classes, not from prompts alone; take sfd or esd")
            for key in ("forget", "prior"):
                if getattr(self, key) is not None:
                    raise ConfigError("the data set `concepts` says what is forgotten; leave it out", key=key)
            self.told = ", ".join(data.concepts)
            return
        if self.forget is None:
            raise ConfigError("name the class to forget, or take the data set `concepts`", key="forget")
        names = list(data.class_names)
        try:
            self.forgotten = class_number(self.forget, names)
        except ValueError as error:
            raise ConfigError(str(error), key="forget") from error
        self.told = str(names[self.forgotten])
        prior = self.prior if self.prior is not None else [1.0] * len(names)
        if len(prior) != len(names) or min(prior) < 0:
            raise ConfigError(f"expected {len(names)} weights, none of them negative: one per class, got {self.prior}", key="prior")
        self.remaining = torch.tensor(prior, dtype=torch.float64)
        self.remaining[self.forgotten] = 0
        if not self.remaining.any():
            raise ConfigError("no class but the forgotten one has a weight; name at least one that remains", key="prior")

    def draw_remaining(self, batch: Batch, noise: Noise) -> Condition | None:
        """For each row of the noise what stays: a class drawn by the prior, or the row's prompt."""
        return condition_of(batch) if self.prompted else {"label": draw_classes(noise, len(noise), self.remaining)}

    def to_forget(self, batch: Batch, noise: Noise) -> Condition | None:
        """For each row of the noise the forgotten class, or the row's prompt that is to be forgotten."""
        if self.prompted:
            return condition_of(part_of(batch, FORGET))
        return {"label": torch.full((len(noise),), self.forgotten, device=noise.rows.device)}
