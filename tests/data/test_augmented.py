"""Augmentation: what is drawn belongs to the place of a sample, and the network is told of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gentrain.config import ConfigError
from gentrain.data.augmented import AUGMENTS, Augmented, bends
from gentrain.data.digits import Digits
from gentrain.data.latents import Latents
from gentrain.models.inputs import Inputs
from gentrain.noise import Noise
from gentrain.training.batches import encoded
from gentrain.training.loop import train
from gentrain.training.roles import build_network, load_network, load_weights
from gentrain.training.run import save_config
from gentrain.training.world import World
from tests.distributed.cases import run_of

COUNT = 2_000
ALONE = World(0, 1, torch.device("cpu"))


def noise(count: int = COUNT, start: int = 0) -> Noise:
    return Noise(5, torch.arange(start, start + count))


def images(count: int = COUNT, side: int = 12) -> Tensor:
    """A ramp to the right: its pixels tell left from right, and not up from down."""
    return torch.linspace(-0.8, 0.8, side).expand(count, 1, side, side)


def augmented(x: Tensor, **fields: Any) -> dict[str, Tensor]:
    return Augmented(Digits(), **fields).augment({"x": x, "label": torch.zeros(len(x))}, noise(len(x)))


def test_flips_mirror_with_their_probability() -> None:
    x = augmented(images(), flip=0.3)["x"]
    mirrored = (x == images().flip(3)).flatten(1).all(1)
    assert (mirrored | (x == images()).flatten(1).all(1)).all() and abs(mirrored.float().mean() - 0.3) < 0.04


def test_crops_move_up_to_their_reach_in_every_direction() -> None:
    x = torch.zeros(COUNT, 1, 9, 9)
    x[:, :, 4, 4] = 1
    moved = augmented(x, crop=2)["x"]
    places = moved.flatten(2).argmax(2)[:, 0]
    rows, columns = places // 9 - 4, places % 9 - 4
    assert set(rows.tolist()) == set(columns.tolist()) == {-2, -1, 0, 1, 2}
    assert (moved.flatten(1).sum(1) == 1).all() and abs(torch.corrcoef(torch.stack([rows, columns]).float())[0, 1]) < 0.07


def test_what_is_drawn_belongs_to_the_place_of_a_sample() -> None:
    data, x = Augmented(Digits(), flip=0.5, crop=1, bend=0.5), torch.rand(8, 1, 8, 8) * 2 - 1
    whole = data.augment({"x": x}, noise(8))
    halves = [data.augment({"x": x[part]}, Noise(5, torch.arange(8)[part])) for part in (slice(3), slice(3, None))]
    for key in ("x", "condition/augment"):
        torch.testing.assert_close(whole[key], torch.cat([half[key] for half in halves]))
    assert not torch.equal(whole["x"], data.augment({"x": x}, noise(8, start=8))["x"])


def test_bends_have_the_laws_of_the_paper() -> None:
    """arXiv:2206.00364, table 6: a part is not applied, and its labels are 0, with probability 1 - p."""
    _, labels = bends(0.12, noise(40_000), 40_000)
    flip, scale, cosine, sine, along, across, right, down = labels.T
    assert abs((flip != 0).float().mean() - 0.06) < 0.005
    for label in (scale, sine, along, right):
        assert abs((label != 0).float().mean() - 0.12) < 0.008
    for label in (scale, right, down):
        assert label[label != 0].mean().abs() < 0.05 and abs(label[label != 0].std() - 1) < 0.05
    angle = torch.atan2(sine, cosine + 1)[sine != 0]
    assert abs(angle.std() - 2 * math.pi / 12**0.5) < 0.05
    length = (along.square() + across.square())[along != 0]
    assert abs(length.mean() - 1) < 0.06


def applied(label: int, value: float) -> Tensor:
    """Where a point of the original comes to lie, for the part that has this label: found by inverting the matrix, [2, 2] and shift."""
    matrices, labels = bends(1.0, noise(20_000), 20_000)
    row = (labels[:, label] - value).abs().argmin()
    return torch.cat([matrices[row], torch.tensor([[0.0, 0, 1]])]).inverse()


def test_each_part_moves_the_image_as_its_label_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone: the others are drawn, and then set to nothing by their probability."""

    class Only(Noise):
        part, calls = 0, 0

        def bernoulli(self, probability: float, shape: tuple[int, ...]) -> Tensor:
            Only.calls += 1
            return torch.full(shape, Only.calls in (1, Only.part + 2))  # the first call is the y-flip's coin

    def alone(part: int) -> tuple[Tensor, Tensor]:
        Only.part, Only.calls = part, 0
        matrices, labels = bends(0.5, Only(5, torch.arange(50)), 50)
        return torch.cat([matrices, torch.tensor([[[0.0, 0, 1]]]).expand(50, 1, 3)], 1).inverse()[:, :2], labels

    forward, labels = alone(0)
    torch.testing.assert_close(forward[:, :, :2], torch.diag(torch.tensor([1.0, -1])).expand(50, 2, 2))
    assert (labels[:, 0] == 1).all() and (labels[:, 1:] == 0).all()
    forward, labels = alone(1)
    torch.testing.assert_close(forward[:, 0, 0], 2 ** (0.2 * labels[:, 1]))
    torch.testing.assert_close(forward[:, 1, 1], 2 ** (0.2 * labels[:, 1]))
    forward, labels = alone(2)
    torch.testing.assert_close(forward[:, 0, 0], labels[:, 2] + 1)
    torch.testing.assert_close(forward[:, 1, 0], labels[:, 3])
    torch.testing.assert_close(torch.linalg.det(forward[:, :, :2]), torch.ones(50))
    forward, labels = alone(3)
    size = labels[:, 4:6].norm(dim=1)
    stretched = torch.linalg.eigvalsh(forward[:, :, :2])
    torch.testing.assert_close(stretched, torch.stack([2 ** (-0.2 * size), 2 ** (0.2 * size)], 1), atol=1e-5, rtol=1e-5)
    forward, labels = alone(4)
    torch.testing.assert_close(forward[:, :, 2], 0.25 * labels[:, 6:])  # an eighth of the image, whose half has length 1
    assert (forward[:, :, :2] - torch.eye(2)).abs().max() < 1e-6


def test_images_move_as_the_matrices_say(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 1, 16, 16)
    x[:, :, 4, 12] = 1  # above, to the right
    matrix, label = torch.tensor([[[1.0, 0, 0], [0, -1, 0]]]), torch.ones(1, 8)
    monkeypatch.setattr("gentrain.data.augmented.bends", lambda *_: (matrix, label))
    moved = augmented(x, bend=0.5)["x"]
    assert moved[0, 0].argmax() == 11 * 16 + 12 and moved.max() > 0.99
    matrix = torch.tensor([[[1.0, 0, -0.25], [0, 1, 0]]])  # an eighth of the image to the right
    assert augmented(x, bend=0.5)["x"][0, 0].argmax() == 4 * 16 + 14


def test_labels_say_what_was_done_and_images_that_nothing_was_done_to_are_as_they_were() -> None:
    x = torch.rand(400, 1, 8, 8) * 2 - 1
    batch = augmented(x, flip=0.5, bend=0.12)
    told = batch["condition/augment"]
    assert told.shape == (400, AUGMENTS)
    untouched, mirrored = (told == 0).all(1), (told[:, 0] == 1) & (told[:, 1:] == 0).all(1)
    assert 40 < untouched.sum() < 200 and torch.equal(batch["x"][untouched], x[untouched])
    assert 40 < mirrored.sum() < 200 and torch.equal(batch["x"][mirrored], x[mirrored].flip(3))
    assert (batch["x"] != x).flatten(1).any(1)[~untouched].all() and batch["x"].abs().max() <= 1


def test_nothing_comes_in_from_beyond_the_border() -> None:
    x = torch.full((200, 1, 8, 8), -0.6)
    torch.testing.assert_close(augmented(x, crop=3, bend=0.9)["x"], x)


def test_the_network_reads_the_labels_and_takes_their_absence_for_an_image_as_it_is() -> None:
    inputs, told = Inputs(["augment"], 6), torch.randn(3, AUGMENTS)
    torch.nn.init.normal_(inputs.projections["augment"].weight)
    assert inputs(torch.zeros(3), {"augment": told}).shape == (3, 6)
    assert torch.equal(torch.as_tensor(inputs(torch.zeros(3), {"augment": torch.zeros(3, AUGMENTS)})), torch.zeros(3, 6))
    assert inputs(torch.zeros(3), {"label": torch.zeros(3)}) == 0 == inputs(torch.zeros(3), None)


def settings(output: Path, **fields: Any) -> dict[str, Any]:
    return {
        "method": "flow_matching",
        "data": {"name": "augmented", "data": "digits", **fields},
        "model": {"name": "unet", "channels": [8, 8], "attention": []},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "engine": "torch",
        "training": {"samples": 32, "batch_size": 16, "log_every": 16},
        "cluster": {"place": "inline", "workers": 1},
        "output": str(output),
    }  # fmt: skip


def test_training_sees_augmented_rows_and_a_run_without_takes_its_weights(tmp_path: Path) -> None:
    run = run_of(settings(tmp_path / "run", bend=0.5))
    assert "inputs.projections.augment.weight" in build_network(run, "model").state_dict()
    save_config(run)
    assert train(run, ALONE, lambda: False).value == "finished"
    trained = load_weights(str(tmp_path / "run"))
    assert trained["inputs.projections.augment.weight"].abs().max() > 0  # of zeros at first: the labels came in
    denoiser, _ = load_network(tmp_path / "run")
    assert denoiser.x0(torch.zeros(2, 1, 8, 8), torch.full((2,), 0.5), {"label": torch.zeros(2, dtype=torch.int64)}).shape == (2, 1, 8, 8)
    plain = settings(tmp_path / "plain", flip=0.5) | {"roles": {"model": {"weights": str(tmp_path / "run")}}}
    assert train(run_of(plain), ALONE, lambda: False).value == "finished"


def test_rows_are_augmented_in_training_and_only_the_own_ones() -> None:
    run = run_of(settings(Path("unused"), flip=1.0))
    batch = {"x": torch.rand(4, 1, 8, 8), "label": torch.arange(4), "index": torch.arange(4), "pool/x": torch.rand(4, 1, 8, 8)}
    seen = encoded(batch, run.data, run.codec(), 0, torch.device("cpu"))
    assert torch.equal(seen["x"], batch["x"].flip(3)) and torch.equal(seen["pool/x"], batch["pool/x"])
    assert all(torch.equal(run.data.split("held_out")[i]["x"], Digits().split("held_out")[i]["x"]) for i in range(3))


def test_what_cannot_be_augmented_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is augmented"):
        Augmented(Digits())
    toy = run_of(settings(Path("unused"), flip=0.5) | {"data": {"name": "augmented", "data": "rings", "flip": 0.5}, "model": "mlp"})
    with pytest.raises(ConfigError, match="rings has no images"):
        toy.fit_space()
    with pytest.raises(ConfigError, match=r"data\.directory"):
        Augmented(Latents("nowhere"), flip=0.5).fit()
