"""Samples that a model has drawn, as rows that training reads beside those of the data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

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

    def items(self, shape: tuple[int, ...], classes: int, vocabulary: int = 0, latent: tuple[int, ...] | None = None) -> TensorItems:
        """The samples, of `shape` with labels below `classes` (-1: none), or tokens below `vocabulary` where there is one.

        latent: another shape that they may have, of what a pipeline draws before it is decoded.

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
        fits = x.dtype == dtype and tuple(x.shape[1:]) in (tuple(shape), latent) and len(x) > 0 and label.dtype == torch.int64
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


@dataclass(frozen=True, eq=False)
class KnownItems(TensorItems):
    """Tokens, and log p of each under a reference: `log_prob` [N, T] with the row's label, `null_log_prob` [N, T] with the null class."""

    log_prob: Tensor
    null_log_prob: Tensor

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**super().__getitem__(index), "log_prob": self.log_prob[index], "null_log_prob": self.null_log_prob[index]}

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        return {**super().batch(indices), "log_prob": self.log_prob[indices], "null_log_prob": self.null_log_prob[indices]}


@dataclass(frozen=True)
class KnownLikelihood:
    """What a stage `reference_likelihood` has asked a role's weights, once, of the tokens of the data and of the pools.

    Attributes: as `Pool`'s.
    """

    directory: str
    role: str
    key: str

    def beside(self, name: str, items: object, digest: str) -> KnownItems:
        """The items, "data" or those of the pool `name`, with what weights of `digest` say of them.

        Raises ConfigError when that is missing, or of other tokens or other weights.
        """
        path = Path(self.directory) / f"{name}.safetensors"
        if not isinstance(items, TensorItems):
            raise self._error("only tokens that are held in memory, as a stage `tokenize` makes them, are known one by one; leave it out")
        try:
            with safe_open(path, "pt") as file:
                head = file.metadata() or {}
                log_prob, null = file.get_tensor("log_prob"), file.get_tensor("null_log_prob")
        except (OSError, SafetensorError) as error:
            what = f"{path} is missing or damaged ({type(error).__name__}: {error})"
            raise self._error(f"{what}; run the stage `reference_likelihood` again") from error
        if head.get("weights") != digest:
            raise self._error(
                f"{path} is what other weights ({head.get('weights', 'unknown')[:12]}) said than those of the role {self.role!r} "
                f"({digest[:12]}); run the stage `reference_likelihood` of the run that roles.{self.role}.weights names"
            )
        if head.get("rows") != rows_digest(items) or log_prob.shape != items.x.shape or null.shape != items.x.shape:
            raise self._error(f"{path} is of other tokens than the {name} has now; run the stage `reference_likelihood` again")
        return KnownItems(items.x, items.label, log_prob, null)

    def _error(self, message: str) -> ConfigError:
        return ConfigError(message, key=self.key)


def rows_digest(items: TensorItems) -> str:
    """SHA-256 of all rows and their labels, in order."""
    digest = hashlib.sha256(f"{list(items.x.shape)}".encode())
    for value in (items.x, items.label):
        digest.update(value.contiguous().numpy().data)
    return digest.hexdigest()
