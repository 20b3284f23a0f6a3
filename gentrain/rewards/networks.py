"""Rewards that are read from networks trained by gentrain itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data
from gentrain.models.towers import Towers, unpack
from gentrain.rewards.base import Asked, Judge, Networks, Reward, Texts
from gentrain.rewards.reading import Read, read_scalar

_ROLE = "names the role: roles.<role>.weights is the run"
_LICENCE = "that of the data on which the network was trained"


@register("classifier")
@dataclass
class ClassifierProbability(Reward):
    """How likely a trained classifier finds the class that was asked for, or always the same one."""

    range: ClassVar[tuple[float, float]] = (-float("inf"), 1.0)
    licence: ClassVar[str] = _LICENCE
    needs: ClassVar[str] = "a run of the method `classifier`, and labels"

    role: str = option("judge", _ROLE)
    scale: Literal["probability", "log"] = option(
        "log", "log: its logarithm, in (-inf, 0], whose gradient does not vanish where the class is not seen at all"
    )
    target: str | int | None = option(None, "class, by number or name; null = the one asked for, where rows without label score 0")

    def networks(self) -> dict[str, Judge]:
        return {self.role: Judge(classifier=True)}

    def check_data(self, data: Data) -> None:
        names = list(data.class_names)
        if not names:
            raise ValueError(f"the reward classifier needs data with classes, which {data.registered_name} has not")
        if self.target is None:
            self.number = None
            return
        known = names if isinstance(self.target, str) else range(len(names))
        if self.target not in known:
            raise ConfigError(f"{self.target!r} is none of the classes {', '.join(names)} (0 to {len(names) - 1})", key="target")
        self.number = names.index(self.target) if isinstance(self.target, str) else self.target

    def __call__(self, images: Tensor, asked: Asked, networks: Networks) -> Tensor:
        log_probability = networks[self.role](images.clamp(-1, 1)).float().log_softmax(1)
        label = asked["label"] if self.number is None else torch.full_like(log_probability[:, 0], self.number, dtype=torch.int64)
        value = log_probability.gather(1, label.clamp(min=0)[:, None]).squeeze(1)
        return torch.where(label < 0, 0.0, value if self.scale == "log" else value.exp())


@register("learned")
@dataclass
class Learned(Reward):
    """A reward model that the method `preference_reward` trained, read as it was trained."""

    range: ClassVar[tuple[float, float]] = (-float("inf"), float("inf"))
    licence: ClassVar[str] = _LICENCE
    needs: ClassVar[str] = "a run of the method `preference_reward`"

    role: str = option("reward_model", _ROLE)
    read: Read = option("class_logit", "as method.read of that run")

    def networks(self) -> dict[str, Judge]:
        return {self.role: Judge(classifier=self.read == "class_logit")}

    def __call__(self, images: Tensor, asked: Asked, networks: Networks) -> Tensor:
        images = images.clamp(-1, 1) if images.ndim == 4 else images
        return read_scalar(self.read, networks[self.role], images, {"label": asked["label"]} if "label" in asked else None)


@register("towers")
@dataclass
class TowerSimilarity(Reward):
    """Cosine between the image's and the text's embedding, of towers that the method `contrastive` trained."""

    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    licence: ClassVar[str] = _LICENCE
    needs: ClassVar[str] = "a run of the method `contrastive` on images of the same size, and captions or classes"

    role: str = option("towers", _ROLE)
    model: Towers = option(Towers, "of that run")
    template: str = option("{}", "{} is the caption, or the name of the class")

    def networks(self) -> dict[str, Judge]:
        return {self.role: Judge(model=self.model)}

    def check_data(self, data: Data) -> None:
        self.texts = Texts(data, self.template)

    def __call__(self, images: Tensor, asked: Asked, networks: Networks) -> Tensor:
        texts, rows = self.texts(asked)
        tokens = self.model.read(texts, images.device)
        found = unpack(networks[self.role](images.clamp(-1, 1), tokens[rows]))
        return cosine_similarity(found.image, found.text.detach(), dim=1)
