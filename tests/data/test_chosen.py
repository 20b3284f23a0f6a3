import pytest
import torch

from gentrain.config import ConfigError
from gentrain.data.chosen import Chosen
from gentrain.data.digits import Digits
from gentrain.data.toys import Rings


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_class_that_is_left_out_is_gone_and_the_others_keep_their_numbers(split: str) -> None:
    whole, chosen = Digits().split(split), Chosen(data=Digits(), leave_out=[3])
    label = whole.label  # type: ignore[attr-defined]
    items = chosen.split(split)
    assert torch.equal(items.label, label[label != 3])  # type: ignore[attr-defined]
    assert torch.equal(items.x, whole.x[label != 3])  # type: ignore[attr-defined]
    assert list(chosen.class_names) == list(Digits().class_names) and chosen.shape == (1, 8, 8)


def test_a_few_items_of_one_class() -> None:
    items = Chosen(data=Digits(), classes=[3], count=20).split("train")
    assert len(items) == 20 and set(items.label.tolist()) == {3}  # type: ignore[attr-defined]
    assert len(Chosen(data=Digits(), classes=[3], count=20).split("held_out")) > 20


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no class 10"):
        Chosen(data=Digits(), leave_out=[10])
    with pytest.raises(ConfigError, match="not both"):
        Chosen(data=Digits(), classes=[1], leave_out=[2])
    with pytest.raises(ConfigError, match="no class is left"):
        Chosen(data=Digits(), leave_out=list(range(10)))
    with pytest.raises(ValueError, match="has no end of items"):
        Chosen(data=Rings(), leave_out=[1]).split("train")
