"""How often a classifier reads a sample as the class that was asked for."""

from __future__ import annotations

from torch import Tensor

from gentrain.metrics.base import Metric


def class_accuracy(predicted: Tensor, asked: Tensor, name: str = "class accuracy") -> Metric:
    """Part of the samples whose predicted class is the asked one, with Wilson's 95 % interval (Wilson 1927).

    Args:
        predicted, asked: [N] int64, N > 0.
    """
    from scipy.stats import binomtest

    if predicted.shape != asked.shape or not len(asked):
        raise ValueError(f"predicted and asked must be as long and not empty, got {tuple(predicted.shape)} and {tuple(asked.shape)}")
    test = binomtest(int((predicted == asked).sum()), len(asked))
    low, high = test.proportion_ci(method="wilson")
    definition = f"part of {len(asked)} samples that the classifier reads as the class asked for; Wilson interval"
    return Metric(name, float(test.statistic), float(low), float(high), "higher", definition)
