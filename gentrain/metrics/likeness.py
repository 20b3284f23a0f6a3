"""How like each generated picture is to the one real picture that it should be, among all real ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gentrain.metrics.base import Metric
from gentrain.metrics.features import EfficientNetLite0

_RESAMPLES = 2_000


def efficientnet_features(x: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1] -> [N, 1280]. Raises ValueError with the remedy where the packages are missing."""
    chosen = EfficientNetLite0()
    network = chosen.network()
    with torch.no_grad():
        return torch.cat([network.features(part) for part in x.split(chosen.at_once)])  # type: ignore[operator]


def rank_among(features: Tensor, real: Tensor, own: Tensor) -> Tensor:
    """Where a picture's own real one stands among all real ones, by cosine similarity: [N] in [0, 1], 0 = nearest, 1 = farthest.

    Ties count half, so that the mean is 1/2 for features that tell nothing.

    Args:
        features: [N, D] of generated pictures. real: [M, D], M > 1. own: [N] int64 places in `real`.
    """
    mean = real.mean(0)  # what all pictures have in common would hide the differences
    similarity = normalize(features - mean, dim=1) @ normalize(real - mean, dim=1).T
    mine = similarity.gather(1, own[:, None])
    return ((similarity > mine).sum(1) + ((similarity == mine).sum(1) - 1) / 2) / (len(real) - 1)


def median_rank(rank: Tensor, name: str, definition: str, seed: int = 0) -> Metric:
    """The median of ranks [N], in %, with the percentile bootstrap interval over the pictures."""
    generator = torch.Generator().manual_seed(seed)
    drawn = rank[torch.randint(len(rank), (_RESAMPLES, len(rank)), generator=generator)].quantile(0.5, dim=1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
    told = f"{definition}; 0 = its own is the nearest, chance 50; percentile bootstrap over {len(rank)} pictures"
    return Metric(name, 100 * float(rank.quantile(0.5)), 100 * low, 100 * high, "lower", told)
