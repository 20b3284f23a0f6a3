import math
import pickle

import pytest
import torch

from gentrain.data.base import BatchItems
from gentrain.data.toys import UNLIMITED, Checkerboard, Mixture, Rings, Spiral

TOYS = [Rings(), Spiral(), Mixture(), Checkerboard()]
COUNT = 40_000


@pytest.fixture(params=TOYS, ids=lambda toy: toy.registered_name)
def toy(request):
    return request.param


def batch(toy, split="train"):
    return toy.split(split).batch(torch.arange(COUNT) % len(toy.split(split)))


def test_an_item_is_a_function_of_seed_split_and_index(toy):
    items = pickle.loads(pickle.dumps(toy.split("train")))
    assert isinstance(items, BatchItems)
    indices = torch.tensor([UNLIMITED - 1, 3, 0, 3])
    together = items.batch(indices)
    for row, index in enumerate(indices.tolist()):
        assert torch.equal(together["x"][row], items[index]["x"]) and together["label"][row] == items[index]["label"]
    other_seed = type(toy)(seed=1).split("train").batch(indices)["x"]
    assert not torch.isclose(together["x"], other_seed).any()
    assert not torch.isclose(together["x"][1:], toy.split("held_out").batch(indices[1:])["x"]).any()


def test_shape_classes_and_sizes(toy):
    drawn = batch(toy)
    assert drawn["x"].shape == (COUNT, *toy.shape) and drawn["x"].dtype == torch.float32
    shares = drawn["label"].bincount() / COUNT
    classes = len(toy.class_names)
    assert len(shares) == classes
    assert (shares - 1 / classes).abs().max() < 5 * math.sqrt(1 / classes / COUNT)
    assert len(toy.split("held_out")) == 2_000 and len(toy.split("train")) == UNLIMITED


def test_rings_lie_at_their_radii():
    drawn = batch(Rings(rings=4, std=0.01))
    radius = drawn["x"].norm(dim=1)
    assert ((radius - (drawn["label"] + 1) / 4).abs() < 0.06).all()
    angle = torch.atan2(drawn["x"][:, 1], drawn["x"][:, 0]) / (2 * math.pi) + 0.5
    assert (angle.sort()[0] - torch.linspace(0, 1, COUNT)).abs().max() < 1.95 / math.sqrt(COUNT)  # Kolmogorov and Smirnov, 0.1 %


def test_spiral_winds_as_documented():
    drawn = batch(Spiral(arms=3, turns=2, std=0))
    radius = drawn["x"].norm(dim=1)
    angle = torch.atan2(drawn["x"][:, 1], drawn["x"][:, 0])
    turns = angle / (2 * math.pi) - 2 * radius - drawn["label"] / 3
    assert (turns - turns.round()).abs().max() < 1e-4
    assert (radius.square().sort()[0] - torch.linspace(0, 1, COUNT)).abs().max() < 1.95 / math.sqrt(COUNT)


def test_mixture_has_its_means_and_covariances():
    toy = Mixture(components=5, radius=0.6, std=0.2)
    drawn = batch(toy)
    for k in range(5):
        x = drawn["x"][drawn["label"] == k].double()
        mean = 0.6 * torch.tensor([math.cos(2 * math.pi * k / 5), math.sin(2 * math.pi * k / 5)])
        assert (x.mean(0) - mean).abs().max() < 5 * 0.2 / math.sqrt(len(x))
        assert (torch.cov(x.T) - 0.04 * torch.eye(2)).abs().max() < 5 * 0.04 * math.sqrt(2 / len(x))


@pytest.mark.parametrize("squares", [3, 4])
def test_checkerboard_fills_each_dark_square_evenly(squares):
    toy = Checkerboard(squares=squares)
    drawn = batch(toy)
    place = (drawn["x"] + 1) * squares / 2
    cell = place.floor().long()
    assert (cell >= 0).all() and (cell < squares).all() and (cell.sum(1) % 2 == 0).all()
    # classes count the dark squares row by row
    assert ((cell[:, 1] * squares + cell[:, 0]) // 2 == drawn["label"]).all()
    assert len(toy.class_names) == (squares**2 + 1) // 2
    inside = (place - cell)[drawn["label"] == 0].double()
    assert (inside.mean(0) - 0.5).abs().max() < 5 / math.sqrt(12 * len(inside))
    assert (torch.cov(inside.T) - torch.eye(2) / 12).abs().max() < 0.01
