"""What a network makes of held-out items, computed once: a cache beside the network's run, by what goes in."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gentrain.models.adapters import digest_of

log = logging.getLogger(__name__)

CACHE = "features"
BATCH = 500


def apply_network(network: nn.Module | Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The network's output for x [N, ...], in portions, without gradients."""
    with torch.no_grad():
        return torch.cat([network(part) for part in x.split(BATCH)])


def cached_features(directory: str | Path, network: nn.Module, x: Tensor) -> Tensor:
    """`network.features` of x [N, ...] -> [N, D], from <directory>/features where they are known.

    A file is named by weights and rows, so it is never of others; a damaged one is made anew. Where none can be written, none is kept.
    """
    rows = hashlib.sha256(f"{tuple(x.shape)}".encode())
    rows.update(x.contiguous().view(torch.uint8).numpy().data)
    key = hashlib.sha256(f"{digest_of(network.state_dict())} {rows.hexdigest()}".encode()).hexdigest()
    path = Path(directory) / CACHE / f"{key}.safetensors"
    features = _known(path, len(x))
    if features is None:
        features = apply_network(network.features, x)  # type: ignore[arg-type]
        try:
            path.parent.mkdir(exist_ok=True)
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
