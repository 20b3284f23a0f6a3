import torch

from gentrain.data.bins import Bins


def test_bins_hold_equally_many_and_label_what_they_say():
    values = torch.randn(1_000, generator=torch.Generator().manual_seed(0)).exp()
    bins = Bins.of("income", values, 4)
    label = bins.label(values)
    assert label.bincount().tolist() == [250] * 4
    for number in range(4):
        low, high = bins.limits[number : number + 2]
        assert ((values[label == number] >= low) & (values[label == number] <= high)).all()
    assert bins.label(torch.tensor([-5.0, 1e9])).tolist() == [0, 3]
    assert bins.names[0].startswith("income ") and " to " in bins.names[0]


def test_values_that_repeat_get_a_bin_each():
    values = torch.tensor([1.0] * 40 + [2.0] * 60)
    bins = Bins.of("children", values, 5)
    assert bins.names == ["children 1 to 2", "children 2 to 2"] and torch.equal(bins.label(values), (values == 2).long())


def test_a_value_on_a_limit_belongs_to_the_bin_above():
    assert Bins("x", (0.0, 1.0, 2.0)).label(torch.tensor([0.5, 1.0, 2.0])).tolist() == [0, 1, 1]
