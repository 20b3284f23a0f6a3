"""Features of images, read by a judge or by a pretrained network; those of held-out items once: a cache, by what goes in."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gentrain.cluster.fleet import spread
from gentrain.config import Document, build, load_plugins, loaded_plugins, to_dict
from gentrain.metrics.features import Features
from gentrain.models.adapters import digest_of
from gentrain.training.roles import load_network

log = logging.getLogger(__name__)

CACHE = "features"
BATCH = 500


def apply_network(network: nn.Module | Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The network's output for x [N, ...], in portions, without gradients."""
    with torch.no_grad():
        return torch.cat([network(part) for part in x.split(BATCH)])


class Reader:
    """Reads features of images: in the process of a stage, or in each actor of its fleet.

    Args:
        judge: a run; its network is asked where no other is given.
        features: configuration of another network.
    """

    def __init__(self, judge: str | None, features: dict[str, Any] | None, plugins: list[str]):
        load_plugins(Document({"plugins": plugins}, "fleet"))
        chosen = None if features is None else build(Features, Document(features, "fleet"))
        self.network: Any = load_network(str(judge))[0] if chosen is None else chosen.network()
        self.at_once = BATCH if chosen is None else chosen.at_once
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network.to(self.device)

    @torch.no_grad()
    def read(self, x: Tensor) -> Tensor:
        """[N, ...] -> [N, D]."""
        return torch.cat([self.network.features(part.to(self.device)).float().cpu() for part in x.split(self.at_once)])


class FeatureSource:
    """Features of one network, the same to the last bit whatever the number of actors (of one thread each, as they have).

    Args:
        judge, features: as of `Reader`. actors: of a Ray fleet that reads; 0 = this process.

    Raises ValueError where the network has no weights.
    """

    def __init__(self, judge: str | None, features: Features | None, actors: int):
        self._arguments = (judge, None if features is None else to_dict(features), loaded_plugins())
        self._alone, self._actors = Reader(*self._arguments), actors
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gentrain"
        self._kept = Path(str(judge)) if features is None else home

    def read(self, x: Tensor) -> Tensor:
        """Images [N, ...] -> [N, D]."""
        parts = x.split(BATCH)
        if self._actors == 0:
            return torch.cat([self._alone.read(part) for part in parts])
        calls = [(part.clone(),) for part in parts]  # a part would carry all rows to every actor
        return torch.cat(list(spread(Reader, self._arguments, "read", calls, self._actors, "features")))

    def read_once(self, x: Tensor) -> Tensor:
        """`read`, from the cache where these are known."""
        return cached_features(self._kept, self._alone.network, x, self.read)


def cached_features(directory: str | Path, network: nn.Module, x: Tensor, read: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """`network.features` of x [N, ...] -> [N, D], from <directory>/features where they are known.

    A file is named by weights and rows, so it is never of others; a damaged one is made anew. Where none can be written, none is kept.

    Args:
        read: computes them; None = all of them here.
    """
    rows = hashlib.sha256(f"{tuple(x.shape)}".encode())
    rows.update(x.contiguous().view(torch.uint8).numpy().data)
    key = hashlib.sha256(f"{digest_of(network.state_dict())} {rows.hexdigest()}".encode()).hexdigest()
    path = Path(directory) / CACHE / f"{key}.safetensors"
    features = _known(path, len(x))
    if features is None:
        features = apply_network(network.features, x) if read is None else read(x)  # type: ignore[arg-type]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{key}.{os.getpid()}")
            save_file({"features": features.contiguous()}, temporary)
            os.replace(temporary, path)
        except OSError as error:
            log.info("features are not kept in %s: %s", path.parent, error.strerror)
    return features


def _known(path: Path, rows: int) -> Tensor | None:
    try:
        features = load_file(path)["features"]
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError) as error:
        log.warning("%s is damaged (%s) and made anew", path, type(error).__name__)
        return None
    fits = features.ndim == 2 and len(features) == rows and features.dtype == torch.float32 and bool(features.isfinite().all())
    return features if fits else None
