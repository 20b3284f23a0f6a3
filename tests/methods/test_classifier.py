"""The classifier method."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from gentrain.methods.base import Clock
from gentrain.methods.classifier import ImageClassifier, shift_images
from gentrain.noise import Noise


class Fixed(torch.nn.Module):
    """Logits that do not depend on the image; remembers what it saw."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, x):
        self.seen = x
        return self.logits


def loss_of(method, network, x, label, seed=0):
    (update,) = method.updates(Clock(0, len(x), 100))
    assert update.role == "classifier" and not method.roles["classifier"].denoiser
    (function,) = update.losses
    return function(SimpleNamespace(classifier=network), {"x": x, "label": label}, Noise(seed, torch.arange(len(x))))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_loss_is_the_smoothed_cross_entropy_and_accuracy_counts_hits(smoothing):
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 3.0]])
    label = torch.tensor([0, 1])
    result = loss_of(ImageClassifier(label_smoothing=smoothing, shift=0), Fixed(logits), torch.zeros(2, 1, 4, 4), label)
    expected = 0.0
    for row, hit in zip(logits.tolist(), label.tolist(), strict=True):
        total = math.log(sum(map(math.exp, row)))
        target = [smoothing / 3 + (1 - smoothing) * (k == hit) for k in range(3)]
        expected += sum(p * (total - z) for p, z in zip(target, row, strict=True)) / 2
    assert result.value.item() == pytest.approx(expected, rel=1e-6)
    assert result.logs["accuracy"].item() == 0.5
    assert not result.logs["accuracy"].requires_grad


def test_images_move_by_their_own_offset():
    x = torch.arange(2 * 2 * 5 * 6, dtype=torch.float32).reshape(2, 2, 5, 6)
    moved = shift_images(x, torch.tensor([[1, -2], [0, 2]]), 2)
    assert moved.shape == x.shape
    assert torch.equal(moved[0, :, 1:, :-2], x[0, :, :-1, 2:])
    assert torch.equal(moved[0, :, 0, :-2], x[0, :, 0, 2:])
    assert torch.equal(moved[0, :, 1:, -1], x[0, :, :-1, -1])
    assert torch.equal(moved[1, :, :, 2:], x[1, :, :, :-2])
    assert torch.equal(shift_images(x, torch.zeros(2, 2, dtype=torch.int64), 3), x)


def test_every_shift_occurs_and_belongs_to_the_sample():
    count = 2000
    x = torch.zeros(count, 1, 9, 9)
    x[:, :, 4, 4] = 1
    label = torch.zeros(count, dtype=torch.int64)
    network = Fixed(torch.zeros(count, 2))
    loss_of(ImageClassifier(shift=2), network, x, label)
    places = network.seen.flatten(1).argmax(1)
    rows, columns = places // 9 - 4, places % 9 - 4
    for moves in (rows, columns):
        assert torch.bincount(moves + 2, minlength=5).min() > count / 5 * 0.8 and moves.abs().max() == 2
    assert abs(torch.corrcoef(torch.stack([rows, columns]).float())[0, 1]) < 0.1
    half = Fixed(torch.zeros(count // 2, 2))
    loss = ImageClassifier(shift=2).loss
    loss(SimpleNamespace(classifier=half), {"x": x[1000:], "label": label[1000:]}, Noise(0, torch.arange(1000, 2000)))
    assert torch.equal(half.seen, network.seen[1000:])


def test_learns_to_tell_bright_from_dark():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    label = torch.arange(32) % 2
    x = (2.0 * label - 1)[:, None, None, None] * torch.ones(32, 1, 4, 4) + 0.3 * torch.randn(32, 1, 4, 4)
    values = []
    for step in range(10):
        result = loss_of(ImageClassifier(), network, x, label, seed=step)
        optimizer.zero_grad()
        result.value.backward()
        optimizer.step()
        values.append(result.value.item())
    assert values[-1] < values[0] and result.logs["accuracy"] == 1
