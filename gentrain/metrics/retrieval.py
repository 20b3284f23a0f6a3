"""How often the right one is among the nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from gentrain.metrics.base import Metric, proportion


def recall(similarity: Tensor, right: Tensor, k: int, what: str) -> Metric:
    """Share of queries whose right candidate is among the k most similar, with its interval. Ties count against it.

    Args:
        similarity: [N, M] of N > 0 queries and M >= k candidates.
        right: [N] int64 in [0, M).

    Raises ValueError if k is not in [1, M].
    """
    if not 1 <= k <= similarity.shape[1]:
        raise ValueError(f"k must be from 1 to the number of candidates {similarity.shape[1]}, got {k}")
    own = similarity.gather(1, right[:, None])
    rank = (similarity >= own).sum(1)  # its own place counts, and so do equals
    chance = k / similarity.shape[1]
    definition = f"{what}: right one among the {k} nearest of {similarity.shape[1]}; chance {chance:.2%}; Wilson interval"
    return proportion(f"{what} @{k}", rank <= k, "higher", definition)


def retrieval(image: Tensor, text: Tensor, caption: Tensor) -> list[Metric]:
    """Recalls @1 and @5, both ways among pairs and among all texts: normalised image [N, D], text [M, D], each image's text [N] int64.

    Each text has at most one image.
    """
    own, every = image @ text[caption].T, torch.arange(len(image), device=image.device)
    metrics = []
    for k in (1, 5):
        metrics += [recall(own, every, k, "image to text"), recall(own.T, every, k, "text to image")]
    return metrics + [recall(image @ text.T, caption, k, "zero-shot class") for k in (1, 5)]
