"""How often a classifier reads a sample as the class that was asked for."""

from __future__ import annotations

from torch import Tensor

from gentrain.metrics.base import Metric, proportion


def class_accuracy(predicted: Tensor, asked: Tensor, name: str = "class accuracy") -> Metric:
    """Part of the samples whose predicted class is the asked one, with its interval.

    Args:
        predicted, asked: [N] int64, N > 0.
    """
    if predicted.shape != asked.shape or not len(asked):
        raise ValueError(f"predicted and asked must be as long and not empty, got {tuple(predicted.shape)} and {tuple(asked.shape)}")
    definition = f"part of {len(asked)} samples that the classifier reads as the class asked for; Wilson interval"
    return proportion(name, predicted == asked, "higher", definition)
