"""What a model has drawn, as data: to teach a judge what it draws for each of some classes or prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gentrain.config import ConfigError, Fraction, option, register
from gentrain.data.base import TensorItems, check_split
from gentrain.data.labels import Labels
from gentrain.data.pool import INFO, SAMPLES


@register("drawn")
@dataclass(kw_only=True)
class Drawn(Labels):
    """The samples of a stage `generate`, each of the class, or the prompt, that it was asked for: data where there are none.

    A judge that learns from them tells what the model drew for one prompt from what it drew for another; of the world it knows nothing.
    """

    directory: str = option(help="of the stage `generate`")
    held_out: Fraction = option(0.1, "part that is kept from training: the last of the samples")

    @property
    def blank(self) -> bool:
        return False

    @property
    def licence(self) -> str:
        return f"drawn by a model (samples in {self.directory}): what binds its output binds them"

    def fit(self) -> None:
        self.directory = str(Path(self.directory).absolute())

    def split(self, name: str) -> TensorItems:
        """Raises ConfigError when the samples are missing, damaged, or of another shape or other classes."""
        check_split(name)
        place = Path(self.directory)
        try:
            found, names = load_file(place / SAMPLES), json.loads((place / INFO).read_bytes())["names"]
            x, label = found["x"], found["label"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            what = f"{place} holds no samples that can be read ({type(error).__name__}: {error})"
            raise ConfigError(f"{what}; draw them with a stage `generate`", key="data.directory") from error
        if list(x.shape[1:]) != list(self.size) or x.dtype != torch.float32 or not x.isfinite().all():
            told = f"{x.dtype} of shape {list(x.shape[1:])}"
            raise ConfigError(f"{place} holds samples {told}; expected finite float32 of shape {self.size}", key="data.size")
        if names != self.classes:
            raise ConfigError(f"{place} holds samples of {', '.join(names)}; name these, in this order", key="data.classes")
        kept = len(x) - round(self.held_out * len(x))
        rows = slice(0, kept) if name == "train" else slice(kept, None)
        return TensorItems(x[rows], label[rows])
