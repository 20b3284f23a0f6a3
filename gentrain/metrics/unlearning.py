"""How well a generator has forgotten a class, and what that did to the others. Every number says what it is divided by."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from gentrain.metrics.base import Metric, proportion
from gentrain.metrics.distances import distance_metric, frechet_distance


def forget_accuracy(read: Tensor, asked: Tensor, forgotten: int, name: str, others: Collection[int] = ()) -> Metric:
    """The share of the samples asked for the forgotten class that a judge reads as that class; 0 = it is never drawn.

    Divided by the number of those samples, not by that of all samples, which would make it smaller by the number of classes. Wilson's
    interval: a bootstrap of no hits at all would claim certainty.

    Args:
        read, asked: [N] int64, the class that the judge reads and the one asked for. Raises ValueError unless some are asked for
            the forgotten class.
        others: classes that are forgotten as well: one of them drawn in place of this one is none forgotten.
    """
    hits = _among(read[_of(asked, forgotten)], {forgotten, *others})
    also = " or another forgotten one" if set(others) - {forgotten} else ""
    told = f"part of {len(hits)} samples asked for the forgotten class that the judge reads as it{also}; Wilson"
    return proportion(name, hits, "lower", told)


def override_rate(read: Tensor, asked: Tensor, forgotten: int, override: int, name: str) -> Metric:
    """The share of the samples asked for the forgotten class that a judge reads as the class it was to be replaced by.

    1 - forget accuracy is no substitute: samples may have left the class for none in particular.
    """
    hits = read[_of(asked, forgotten)] == override
    return proportion(name, hits, "higher", f"part of {len(hits)} samples asked for the forgotten class read as its replacement; Wilson")


def remain_accuracy(read: Tensor, asked: Tensor, forgotten: Collection[int], name: str) -> Metric:
    """The share of the samples asked for any class that is not forgotten that a judge reads as the class asked for."""
    rows = ~_among(asked, forgotten)
    if not rows.any():
        raise ValueError("no sample is asked for a class that remains; draw all classes")
    hits = read[rows] == asked[rows]
    return proportion(name, hits, "higher", f"part of {len(hits)} samples asked for the other classes read as the one asked for; Wilson")


def remain_distance(features: Tensor, asked: Tensor, real: Tensor, label: Tensor, forgotten: Collection[int], name: str) -> Metric:
    """Frechet distance between samples of the classes that remain and held-out items of the same classes, in a judge's features.

    Args:
        features: [N, D] of the samples asked for `asked` [N]. real: [M, D] of held-out items of class `label` [M].
    """
    kept, there = features[~_among(asked, forgotten)], real[~_among(label, forgotten)]
    definition = f"of the judge's {real.shape[1]} penultimate features, on the classes that remain"
    return distance_metric(name, frechet_distance, kept, there, definition)


def _among(classes: Tensor, given: Collection[int]) -> Tensor:
    return torch.isin(classes, torch.tensor(sorted(given)))


def _of(asked: Tensor, forgotten: int) -> Tensor:
    rows = torch.nonzero(asked == forgotten)[:, 0]
    if not len(rows):
        raise ValueError(f"no sample is asked for the forgotten class {forgotten}; draw it as well")
    return rows
