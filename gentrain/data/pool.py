"""Samples that a model has drawn, as rows that training reads beside those of the data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gentrain.config import ConfigError
from gentrain.data.base import TensorItems

SAMPLES = "samples.safetensors"
INFO = "info.json"


@dataclass(frozen=True)
class Pool:
    """What a stage `generate` has drawn from a role of the method, without guidance or the like.

    Attributes:
        directory: of the stage.
        role: whose weights must have drawn the samples.
        key: of the configuration, for messages.
    """

    directory: str
    role: str
    key: str

    def items(self, shape: tuple[int, ...], classes: int, vocabulary: int = 0) -> TensorItems:
        """The samples, of `shape` with labels below `classes` (-1: none), or tokens below `vocabulary` where there is one.

        Raises ConfigError when they are missing or others.
        """
        path = Path(self.directory) / SAMPLES
        try:
            found = load_file(path)
            x, label = found["x"], found["label"]
        except (OSError, SafetensorError, KeyError) as error:
            what = f"{path} is missing or damaged ({type(error).__name__}: {error})"
            raise self._error(f"{what}; draw the samples with a stage `generate`") from error
        dtype = torch.int64 if vocabulary else torch.float32
        fits = x.dtype == dtype and x.shape[1:] == torch.Size(shape) and len(x) > 0 and label.dtype == torch.int64
        if not fits or label.shape != x.shape[:1] or not x.isfinite().all():
            what = f"x {x.dtype} {list(x.shape)}, label {label.dtype} {list(label.shape)}"
            remedy = "; a pool of tokens is drawn with decoded: false" if vocabulary else ""
            raise self._error(f"{path} holds {what}; expected finite {dtype} samples {list(shape)} with an int64 label each{remedy}")
        if vocabulary and (x.min() < 0 or x.max() >= vocabulary):
            raise self._error(f"{path} has tokens from {x.min()} to {x.max()}; the data have {vocabulary} values")
        if label.min() < -1 or label.max() >= max(classes, 1):
            raise self._error(f"{path} has labels from {label.min()} to {label.max()}; the data have {classes} classes")
        return TensorItems(x, label)

    def require(self, digest: str) -> None:
        """Raises ConfigError unless weights of this digest drew the samples, by its own law: others are no samples of the role."""
        path = Path(self.directory) / INFO
        try:
            info = json.loads(path.read_bytes())
            weights, other_law = str(info["weights"]), info["other_law"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            what = f"{path} does not say which weights drew the samples ({type(error).__name__}: {error})"
            raise self._error(f"{what}; draw them again") from error
        if weights != digest:
            raise self._error(
                f"the samples in {self.directory} were drawn by other weights ({weights[:12]}) than those of the role {self.role!r} "
                f"({digest[:12]}); draw them from the run that roles.{self.role}.weights names"
            )
        if other_law is not None:
            raise self._error(
                f"the samples in {self.directory} were drawn with {other_law}, which are no samples of the role {self.role!r}; "
                "draw them without it"
            )

    def _error(self, message: str) -> ConfigError:
        return ConfigError(message, key=self.key)
