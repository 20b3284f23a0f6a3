"""The judge's network."""

from __future__ import annotations

import pytest
import torch

from gentrain.models.cnn import CNN


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 8, 8), (3, 20, 36)])
def test_features_lead_to_the_logits_and_every_parameter_learns(shape):
    torch.manual_seed(0)
    network = CNN(channels=(8, 16)).build(shape, 5)
    x = torch.randn(6, *shape)
    features, logits = network.features(x), network(x)
    assert features.shape == (6, 128) and logits.shape == (6, 5)
    torch.testing.assert_close(network.logits(features), logits)
    torch.nn.functional.cross_entropy(logits, torch.arange(6) % 5).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_rows_do_not_influence_each_other():
    torch.manual_seed(0)
    network = CNN(channels=(8,)).build((1, 8, 8), 3)
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(network(x)[1:2], network(x[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "shape", "num_classes", "message"),
    [
        ({}, (2,), 3, "images"),
        ({}, (1, 3, 28), 3, "too small to halve 2 times"),
        ({}, (1, 28, 28), 0, "needs data with classes"),
    ],
)
def test_data_that_do_not_fit_are_refused(fields, shape, num_classes, message):
    with pytest.raises(ValueError, match=message):
        CNN(**fields).build(shape, num_classes)


@pytest.mark.parametrize(("channels", "message"), [((), "at least one level"), ((12,), "12 is not divisible by norm_groups 8")])
def test_fields_that_contradict_each_other_are_refused(channels, message):
    with pytest.raises(ValueError, match=message):
        CNN(channels=channels)
