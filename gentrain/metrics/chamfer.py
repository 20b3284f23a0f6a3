"""Distances to nearest neighbours: how far samples lie from the data, and data from the samples."""

from __future__ import annotations

import torch
from torch import Tensor


def chamfer_distance(a: Tensor, b: Tensor) -> float:
    """Mean distance from each row of a to the nearest of b, plus that from each of b to the nearest of a: [N, D], [M, D].

    Both terms count: samples beside the data, and data without samples. It sees a blur that distances of whole laws hardly notice, and is
    never 0 for finite samples, so compare it at equal sizes only (Fan, Su, Guibas 2017, with distances in place of their squares).
    """
    a, b = a.double(), b.double()
    nearest_of_b = torch.full((len(b),), float("inf"), dtype=torch.float64)
    total = 0.0
    for part in a.split(1024):
        distances = torch.cdist(part, b)
        total += float(distances.min(1).values.sum())
        nearest_of_b = torch.minimum(nearest_of_b, distances.min(0).values)
    return total / len(a) + float(nearest_of_b.mean())
