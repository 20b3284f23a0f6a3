"""Pairs of samples of which one was preferred."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from pydantic import PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from gentrain.config import option, register
from gentrain.data.base import Data, check_split


@dataclass(frozen=True, eq=False)
class Pairs:
    """Rows of preferred samples, with the rejected ones beside them: all [N, ...] float32, label [N] int64.

    votes: [N, 3] float32, how many annotators preferred the first, the second, and neither.
    caption: [N] int64, the place of each pair's prompt; None without prompts.
    """

    preferred: Tensor
    rejected: Tensor
    label: Tensor
    votes: Tensor
    caption: Tensor | None = None

    def __len__(self) -> int:
        return len(self.preferred)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.batch(torch.tensor([index])).items()}

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        label = self.label[indices]
        rejected = {"rejected/x": self.rejected[indices], "rejected/label": label}
        asked = {} if self.caption is None else dict.fromkeys(("caption", "rejected/caption"), self.caption[indices])
        return {"x": self.preferred[indices], "label": label, "votes": self.votes[indices], **rejected, **asked}


@register("preferences")
@dataclass
class Preferences(Data):
    """A safetensors file with `preferred` and `rejected` [N, ...] float32 and `label` [N] int64, row by row; the last rows are held out.

    Where several annotators saw each pair, or could not decide, it has `votes` [N, 3] int64 too: how many preferred the first, the second,
    and neither. Without them one annotator preferred the first. Where both samples of a pair were to show a prompt, the file has `caption`
    [N] int64: the line, from 0, of `prompts`.
    """

    file: str = option(help="path of the file")
    classes: list[str] = option(list, "names of the classes; none = the pairs have no labels")
    prompts: str | None = option(None, "text file, one prompt per line; null = the pairs have no prompts")
    held_out: PositiveInt = option(100, "pairs of the held-out split", unit="pairs")
    rights: str = option("not stated", "where the pairs come from and under which licence")

    @property
    def shape(self) -> tuple[int, ...]:
        try:
            with safe_open(Path(self.file), "pt") as opened:
                return tuple(opened.get_slice("preferred").get_shape()[1:])
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.file} holds no pairs ({error}); it needs preferred and rejected, [N, ...] float32") from error

    @property
    def to_come(self) -> bool:
        return not Path(self.file).exists()

    @property
    def voted(self) -> bool:
        """Whether the file tells votes. Raises ValueError as `shape` does."""
        _ = self.shape
        with safe_open(Path(self.file), "pt") as opened:
            return "votes" in opened.keys()  # noqa: SIM118  # not iterable

    @property
    def class_names(self) -> Sequence[str]:
        return self.classes

    @cached_property
    def captions(self) -> Sequence[str]:
        """Raises ValueError when the prompts cannot be read."""
        if self.prompts is None:
            return ()
        try:
            return Path(self.prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the prompts in {self.prompts} cannot be read ({error}); name a text file in UTF-8") from error

    @property
    def licence(self) -> str:
        return self.rights

    def split(self, name: str) -> Pairs:
        check_split(name)
        shape, found = self.shape, load_file(Path(self.file))
        preferred, rejected = found["preferred"], found.get("rejected", torch.empty(0))
        label = found.get("label", torch.full((len(preferred),), -1))
        if preferred.dtype != torch.float32 or rejected.shape != preferred.shape or rejected.dtype != torch.float32:
            raise ValueError(f"{self.file}: preferred and rejected must be float32 tensors of one shape, [N, *{list(shape)}]")
        if label.shape != preferred.shape[:1] or label.dtype != torch.int64 or (len(label) and label.max() >= max(len(self.classes), 1)):
            raise ValueError(f"{self.file}: label must be [N] int64 below {len(self.classes)}, the number of `classes`")
        votes = found.get("votes", torch.tensor([[1, 0, 0]]).expand(len(preferred), 3))
        if votes.shape != (len(preferred), 3) or votes.dtype != torch.int64 or (len(votes) and (votes.min() < 0 or votes.sum(1).min() < 1)):
            raise ValueError(f"{self.file}: votes must be [N, 3] int64, none negative and at least one for each pair")
        caption = found.get("caption") if self.prompts is not None else None
        if self.prompts is not None and (
            caption is None or caption.shape != preferred.shape[:1] or caption.dtype != torch.int64
            or (len(caption) and not 0 <= int(caption.min()) <= int(caption.max()) < len(self.captions))
        ):  # fmt: skip
            raise ValueError(f"{self.file}: caption must be [N] int64, each a line from 0 to {len(self.captions) - 1} of {self.prompts}")
        if self.held_out >= len(preferred):
            raise ValueError(f"{self.file} has {len(preferred)} pairs, of which {self.held_out} cannot be held out; lower held_out")
        part = slice(-self.held_out, None) if name == "held_out" else slice(0, -self.held_out)
        asked = None if caption is None else caption[part]
        return Pairs(preferred[part], rejected[part], label[part], votes[part].float(), asked)
