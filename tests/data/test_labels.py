from typing import Any

import pytest
import torch

from gentrain.config import ConfigError
from gentrain.data.labels import Labels
from gentrain.data.loader import Loader


def test_there_are_labels_and_no_pixels() -> None:
    data = Labels(size=[1, 4, 4], classes=["cat", "dog"])
    batch = next(iter(Loader(data.split("train"), seed=0, batch_size=4000)))[0]
    assert data.shape == batch["x"].shape[1:] == (1, 4, 4) and batch["x"].abs().max() == 0
    assert batch["label"].double().mean().item() == pytest.approx(0.5, abs=0.04)  # 5 standard errors
    assert list(data.class_names) == ["cat", "dog"] and "no data" in data.licence
    assert torch.equal(data.split("train")[7]["label"], data.split("train").batch(torch.tensor([7]))["label"][0])


@pytest.mark.parametrize("given, key", [({"size": [4, 4]}, "size"), ({"classes": []}, "classes"), ({"classes": ["a", "a"]}, "classes")])
def test_what_is_no_shape_or_class_is_refused(given: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Labels(**{"size": [4], "classes": ["a"], **given})
    assert raised.value.key == key
