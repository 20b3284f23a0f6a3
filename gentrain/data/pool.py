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
    """What a stage `generate` has drawn from a role of the method, without guidance.

    Attributes:
        directory: of the stage.
        role: whose weights must have drawn the samples.
        key: of the configuration, for messages.
    """

    directory: str
    role: str
    key: str

    def items(self, shape: tuple[int, ...], classes: int) -> TensorItems:
        """The samples, of `shape` with labels below `classes` (-1: none). Raises ConfigError when they are missing or others."""
        path = Path(self.directory) / SAMPLES
        try:
            found = load_file(path)
            x, label = found["x"], found["label"]
        except (OSError, SafetensorError, KeyError) as error:
            what = f"{path} is missing or damaged ({type(error).__name__}: {error})"
            raise self._error(f"{what}; draw the samples with a stage `generate`") from error
        fits = x.dtype == torch.float32 and x.shape[1:] == torch.Size(shape) and len(x) > 0 and label.dtype == torch.int64
        if not fits or label.shape != x.shape[:1] or not x.isfinite().all():
            what = f"x {x.dtype} {list(x.shape)}, label {label.dtype} {list(label.shape)}"
            raise self._error(f"{path} holds {what}; expected finite float32 samples of shape {list(shape)} with an int64 label each")
        if label.min() < -1 or label.max() >= max(classes, 1):
            raise self._error(f"{path} has labels from {label.min()} to {label.max()}; the data have {classes} classes")
        return TensorItems(x, label)

    def require(self, digest: str) -> None:
        """Raises ConfigError unless weights of this digest drew the samples, without guidance: others are no samples of the role."""
        path = Path(self.directory) / INFO
        try:
            info = json.loads(path.read_bytes())
            weights, guidance = str(info["weights"]), float(info["sampler"]["guidance"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            what = f"{path} does not say which weights drew the samples ({type(error).__name__}: {error})"
            raise self._error(f"{what}; draw them again") from error
        if weights != digest:
            raise self._error(
                f"the samples in {self.directory} were drawn by other weights ({weights[:12]}) than those of the role {self.role!r} "
                f"({digest[:12]}); draw them from the run that roles.{self.role}.weights names"
            )
        if guidance != 1:
            raise self._error(
                f"the samples in {self.directory} were drawn with guidance {guidance:g}, which are no samples of the role {self.role!r}; "
                "draw them with sampler.guidance=1"
            )

    def _error(self, message: str) -> ConfigError:
        return ConfigError(message, key=self.key)
