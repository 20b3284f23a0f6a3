"""Prompts of what a model is to forget, what is to be drawn instead, and what is to stay: for methods that need no images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data, check_split
from gentrain.data.toys import UNLIMITED
from gentrain.noise import Noise, derive

FORGET, OVERRIDE, NEGATIVE = "forget", "override", "negative"  # parts of a batch: "<part>/caption", and what a codec makes of it


@dataclass
class Concept:
    """What is to be forgotten, by the words that name it, and the rule that says what a prompt with them gives instead.

    `replace: dog`: prompts of the set that name the concept are the forget set; what is drawn instead is the prompt with `dog` in
    place of the words. `append: true`: prompts that do not name it, with one of the words before or behind them, are the forget
    set; what is drawn instead is the prompt alone.
    """

    words: list[str] = option(help="that name it, in any case, as whole words")
    replace: str | None = option(None, "rule: what stands in their place in the prompt that is drawn instead")
    append: bool = option(False, "rule: the words are appended to prompts that do not name it")
    negative: str | None = option(
        None, "prompt that the teacher is guided away from where it stands in for the concept; null = the empty one"
    )

    def __post_init__(self) -> None:
        if not self.words or not all(word.strip() for word in self.words):
            raise ConfigError("name the words that stand for the concept, none of them empty", key="words")
        if (self.replace is not None) == self.append:
            raise ConfigError(
                "give one rule: what replaces the words (replace: dog), or that they are appended (append: true)", key="replace"
            )
        if self.replace is not None and self.names(self.replace):
            raise ConfigError(f"{self.replace!r} names the concept itself", key="replace")

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.words, key=len, reverse=True)
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)

    def names(self, prompt: str) -> bool:
        """Whether the prompt names the concept."""
        return self._pattern.search(prompt) is not None

    def pairs(self, prompts: Sequence[str]) -> list[tuple[str, str]]:
        """(prompt to forget, prompt that is drawn instead) of all that the rule makes of the prompts."""
        if self.replace is not None:
            there = self.replace
            return [(prompt, self._pattern.sub(lambda match: there, prompt)) for prompt in prompts if self.names(prompt)]
        plain = [prompt for prompt in prompts if not self.names(prompt)]
        return [(whole, prompt) for prompt in plain for word in self.words for whole in (f"{prompt} {word}", f"{word} {prompt}")]


class _Pair(NamedTuple):
    forget: int
    override: int
    negative: int


@register("concepts")
@dataclass
class Concepts(Data):
    """Prompts that name a concept to forget, with what each gives instead, and prompts that name none: no images are needed.

    Each row is a prompt that stays ("caption"), one to forget and what is drawn instead ("forget/caption", "override/caption"): concepts
    alike, then the prompts of the concept alike. x is 0: only its shape counts. For `sfd` and `esd`.
    """

    prompts: Data = option(help="a data set with captions, such as `prompts`; its images are not read")
    concepts: dict[str, Concept] = option(help="name -> words and rule")

    def __post_init__(self) -> None:
        if not self.concepts:
            raise ConfigError("name at least one concept", key="concepts")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.prompts.shape)

    @property
    def class_names(self) -> Sequence[str]:
        return ()

    @property
    def blank(self) -> bool:
        return True

    @property
    def licence(self) -> str:
        return f"prompts alone: {self.prompts.licence}"

    @cached_property
    def _pairs(self) -> dict[str, list[tuple[str, str]]]:
        """concept -> its pairs. Raises ValueError when a concept has none."""
        captions, found = self.prompts.captions, {}
        for name, concept in self.concepts.items():
            # what is drawn in place of one concept is no other one
            found[name] = [pair for pair in concept.pairs(captions) if not any(each.names(pair[1]) for each in self.concepts.values())]
            if not found[name]:
                words = ", ".join(concept.words)
                raise ValueError(
                    f"no prompt is left to forget for the concept {name!r} (words: {words}); add prompts with them, or another replacement"
                )
        return found

    @cached_property
    def remaining(self) -> list[str]:
        """The prompts that name no concept. Raises ValueError when there are none."""
        found = [prompt for prompt in self.prompts.captions if not any(each.names(prompt) for each in self.concepts.values())]
        if not found:
            raise ValueError("every prompt names a concept to forget; add prompts of what is to stay")
        return found

    @cached_property
    def captions(self) -> Sequence[str]:
        told = [text for pairs in self._pairs.values() for pair in pairs for text in pair]
        negatives = [concept.negative or "" for concept in self.concepts.values()] if self.has_negatives else []
        return list(dict.fromkeys([*self.remaining, *told, *negatives]))

    @property
    def has_negatives(self) -> bool:
        return any(concept.negative for concept in self.concepts.values())

    def fit(self) -> None:
        self.prompts.fit()
        _ = self.captions

    def split(self, name: str) -> ConceptItems:
        check_split(name)
        places = {text: place for place, text in enumerate(self.captions)}
        rows = [
            [_Pair(places[forget], places[override], places.get(self.concepts[concept].negative or "", -1)) for forget, override in pairs]
            for concept, pairs in self._pairs.items()
        ]
        return ConceptItems(self.shape, len(self.remaining), rows, self.has_negatives, derive(0, "concepts", name))


@dataclass(frozen=True)
class ConceptItems:
    """Rows without end, each drawn by its index.

    Args:
        remaining: the first so many captions stay. pairs: of each concept.
    """

    shape: tuple[int, ...]
    remaining: int
    pairs: list[list[_Pair]]
    negatives: bool
    seed: int

    def __len__(self) -> int:
        return UNLIMITED

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.batch(torch.tensor([index])).items()}

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        noise, count = Noise(self.seed, indices), len(indices)
        stays, concept = noise.randint(0, self.remaining, (count,)), noise.randint(0, len(self.pairs), (count,))
        sizes = torch.tensor([len(pairs) for pairs in self.pairs])[concept]
        which = (noise.uniform((count,)).double() * sizes).long()
        drawn = torch.tensor([self.pairs[c][p] for c, p in zip(concept.tolist(), which.tolist(), strict=True)]).reshape(-1, 3)
        batch = {"x": torch.zeros(count, *self.shape), "caption": stays}
        parts = (FORGET, OVERRIDE, NEGATIVE) if self.negatives else (FORGET, OVERRIDE)
        return batch | {f"{part}/caption": drawn[:, column] for column, part in enumerate(parts)}
