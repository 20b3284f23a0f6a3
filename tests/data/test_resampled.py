"""Class balance, repeat factors, weights in the loss, and mixtures of data sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gentrain.config import ConfigError, build
from gentrain.data.base import Data, Items, TensorItems
from gentrain.data.combined import Combined, Part, places
from gentrain.data.digits import Digits
from gentrain.data.loader import Loader
from gentrain.data.resampled import Resampled
from gentrain.data.toys import Rings
from gentrain.document import Document
from gentrain.methods.base import weighed
from gentrain.methods.classifier import ImageClassifier
from gentrain.methods.diffusion import Diffusion
from gentrain.methods.flow_matching import FlowMatching
from gentrain.paths.rectified_flow import RectifiedFlow
from tests.distributed.cases import run_of, values
from tests.methods.toy import TinyNetwork, batch_of, nets_with, noise_of


class _OneByOne:
    def __init__(self, items: TensorItems):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.items[index]


@dataclass
class Counted(Data):
    """So many items of each class, each the number of its place."""

    counts: tuple[int, ...] = (8, 3, 1)
    names: tuple[str, ...] = ("a", "b", "c")
    first: float = 0.0
    one_by_one: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (1,)

    @property
    def class_names(self) -> list[str]:
        return list(self.names)

    @property
    def licence(self) -> str:
        return f"of {self.names[0]}"

    def split(self, name: str) -> Items:
        labels = torch.repeat_interleave(torch.arange(len(self.counts)), torch.tensor(self.counts))
        items = TensorItems(self.first + torch.arange(len(labels), dtype=torch.float32)[:, None], labels)
        return _OneByOne(items) if self.one_by_one else items


def epoch(data: Data) -> dict[str, Tensor]:
    """All items of an epoch, in the order of their numbers."""
    items = data.split("train")
    return {key: torch.stack([items[i][key] for i in range(len(items))]) for key in items[0]}


@pytest.mark.parametrize("one_by_one", [False, True])
def test_balanced_classes_come_equally_often_and_every_item_comes(one_by_one: bool) -> None:
    found = epoch(Resampled(Counted(one_by_one=one_by_one)))
    assert torch.bincount(found["label"]).tolist() == [8, 8, 8]
    assert torch.bincount(found["x"][:, 0].long()).tolist() == [1] * 8 + [3, 3, 2] or sorted(
        torch.bincount(found["x"][:, 0].long())[8:11].tolist()
    ) == [2, 3, 3]


def test_repeat_factors_are_the_roots_of_the_papers_formula() -> None:
    """max(1, sqrt(t / f)): shares 0.8, 0.16, 0.04 and t = 0.36 give 1, 1.5, 3."""
    found = epoch(Resampled(Counted((80, 16, 4)), balance="repeat_factor", threshold=0.36))
    assert torch.bincount(found["label"]).tolist() == [80, 24, 12]
    times = torch.bincount(found["x"][:, 0].long())
    assert times[80:96].sort().values.tolist() == [1] * 8 + [2] * 8 and times[96:].tolist() == [3] * 4


def test_classes_come_as_often_as_is_given() -> None:
    found = epoch(Resampled(Counted(), balance="given", repeat={"b": 2.0, "a": 0.5}))
    assert torch.bincount(found["label"]).tolist() == [4, 6, 1] and found["x"].unique().numel() == 4 + 3 + 1


def test_what_is_held_out_is_as_it_was() -> None:
    assert len(Resampled(Counted()).split("held_out")) == 12


def test_unbiased_weights_make_the_mean_loss_that_of_the_data() -> None:
    for data in (Resampled(Counted(), unbiased=True), Resampled(Counted(), balance="given", repeat={"c": 5.0}, unbiased=True)):
        found = epoch(data)
        torch.testing.assert_close((found["weight"] * found["x"][:, 0]).mean(), torch.arange(12.0).mean(), rtol=0.02, atol=0)
        torch.testing.assert_close(found["weight"].mean(), torch.tensor(1.0))
        assert data.weighted


def test_classes_have_the_weights_that_are_given_in_batches_too() -> None:
    data = Resampled(Counted(), balance="given", repeat={"a": 1.0}, weights={"b": 3.0})
    found = epoch(data)
    assert found["weight"].tolist() == [3.0 if label == 1 else 1.0 for label in found["label"].tolist()]
    batch = next(iter(Loader(data.split("train"), 0, 12)))[0]
    assert batch["weight"].tolist() == [3.0 if label == 1 else 1.0 for label in batch["label"].tolist()]
    assert not Resampled(Counted()).weighted and "weight" not in epoch(Resampled(Counted()))


def test_weights_of_the_data_themselves_stay_in_the_product() -> None:
    inner = Resampled(Counted(), balance="given", repeat={"a": 1.0}, weights={"a": 2.0})
    outer = epoch(Resampled(inner, balance="given", repeat={"a": 1.0}, weights={"a": 5.0, "b": 7.0}))
    assert outer["weight"].tolist() == [{0: 10.0, 1: 7.0, 2: 1.0}[label] for label in outer["label"].tolist()]


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"balance": "given"}, "`repeat` says how often"),
    ({"repeat": {"a": 2.0}}, "`repeat` says how often"),
    ({"balance": "given", "repeat": {"d": 2.0}}, "no class 'd'; the classes: a, b, c"),
    ({"weights": {"d": 2.0}}, "no class 'd'"),
]


@pytest.mark.parametrize("fields, message", MISTAKES)
def test_mistakes_are_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Resampled(Counted(), **fields).fit()


def test_data_without_end_and_epochs_without_end_are_refused() -> None:
    with pytest.raises(ValueError, match="the data set has no end of items, so that none can be chosen by their classes"):
        Resampled(Rings()).split("train")
    with pytest.raises(ValueError, match=r"an epoch would have more than \d+ items; lower data\.repeat"):
        Resampled(Digits(), balance="given", repeat={"3": 1e9}).split("train")


# --- weights in the loss ---


@pytest.mark.parametrize("method", [FlowMatching(), Diffusion()])
def test_rows_count_in_the_loss_by_their_weight(method: Any) -> None:
    nets, batch = nets_with(TinyNetwork(), RectifiedFlow(), "velocity"), batch_of(4)
    alone = torch.stack([method.loss(nets, {k: v[i : i + 1] for k, v in batch.items()}, noise_of(1, i)).value for i in range(4)])
    weight = torch.tensor([0.0, 1.0, 2.0, 5.0])
    loss = method.loss(nets, {**batch, "weight": weight}, noise_of(4))
    torch.testing.assert_close(loss.value, (alone * weight).mean())
    torch.testing.assert_close(sum(value for key, value in loss.logs.items() if "noise" in key), loss.value.detach())


def test_a_judge_weighs_its_rows() -> None:
    logits = torch.randn(4, 3)
    method = ImageClassifier(shift=0)
    nets: Any = type("Nets", (), {"classifier": staticmethod(lambda x: logits[: len(x)])})
    batch = {"x": torch.zeros(4, 1, 4, 4), "label": torch.tensor([0, 1, 2, 0])}
    one = method.loss(nets, {**batch, "weight": torch.tensor([0.0, 0, 4, 0])}, noise_of(4)).value
    expected = torch.nn.functional.cross_entropy(logits[2:3], torch.tensor([2]), label_smoothing=0.1)
    torch.testing.assert_close(one, expected)


def test_rows_without_weights_are_left_alone() -> None:
    assert torch.equal(weighed(torch.arange(3.0), {}), torch.arange(3.0))


def test_a_method_that_does_not_weigh_refuses_weighted_data() -> None:
    settings = values(Path("unused"), "flow_matching", "torch")
    settings["data"] = {"name": "resampled", "data": "digits", "unbiased": True}
    run_of(settings | {"model": "unet"})
    with pytest.raises(
        ConfigError, match=r"mean_flow does not weigh its samples, which have weights; these do: classifier, diffusion, .*flow_matching"
    ):
        run_of(settings | {"model": "unet", "method": "mean_flow"})


# --- mixtures ---


def test_places_are_in_proportion_and_leave_no_item_out() -> None:
    assert places([1, 1], [10, 4]) == [10, 10]
    assert places([3, 1], [10, 4]) == [12, 4]
    assert places([0.9, 0.1], [9, 9]) == [81, 9]


def test_an_epoch_has_the_proportions_and_all_items() -> None:
    mixed = Combined([Part(Counted((4, 4), ("a", "b"))), Part(Counted((3,), ("b",), first=100.0), 3.0)])
    mixed.fit()
    found = epoch(mixed)
    first = found["x"][:, 0] < 100
    assert int(first.sum()) == 8 and int((~first).sum()) == 24
    assert torch.bincount(found["x"][:, 0].long())[[*range(8), 100, 101, 102]].tolist() == [1] * 8 + [8] * 3
    assert mixed.class_names == ["a", "b"] and found["label"][~first].unique().tolist() == [1]
    assert found["label"][first].tolist() == [0] * 4 + [1] * 4
    assert len(mixed.split("held_out")) == 11 and mixed.licence == "of a; of b"


def test_batches_mix_the_parts_the_same_on_any_number_of_ranks() -> None:
    mixed = Combined([Part(Counted((20,), ("a",))), Part(Counted((20,), ("b",), first=100.0), 3.0)])

    def read(rank: int, size: int, start: int = 0) -> list[float]:
        batches = iter(Loader(mixed.split("train"), 0, 40, rank, size, start=start))
        return torch.cat([next(batches)[0]["x"][:, 0] for _ in range(2)]).tolist()

    whole = read(0, 1)
    assert 4 <= sum(value < 100 for value in whole[:40]) <= 17
    ranks = [read(rank, 2) for rank in range(2)]
    assert ranks[0][:20] + ranks[1][:20] + ranks[0][20:] + ranks[1][20:] == whole and read(0, 1, 40)[:40] == whole[40:]


def test_toys_without_end_and_data_with_one_mix() -> None:
    mixed = Combined([Part(Rings(), 1.0), Part(Rings(seed=3), 2.0)])
    batch = next(iter(Loader(mixed.split("train"), 0, 30)))[0]
    assert batch["x"].shape == (30, 2)


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least two"):
        Combined([Part(Counted())])
    for other, message in (
        (Digits(), r"its samples are \(1, 8, 8\)"),
        (Resampled(Counted(), unbiased=True), "unless all have them, weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            Combined([Part(Counted()), Part(other)]).fit()
    nameless = Counted((4,), ())
    with pytest.raises(ConfigError, match="either every part has classes"):
        Combined([Part(Counted()), Part(nameless)]).fit()


def test_a_mixture_is_configured_as_any_data() -> None:
    document = Document({"parts": [{"data": "rings"}, {"data": {"name": "rings", "seed": 2}, "weight": 2.0}]}, "x.yaml", {})
    built = build(Combined, document)
    assert [part.weight for part in built.parts] == [1.0, 2.0] and isinstance(built.parts[1].data, Rings)
