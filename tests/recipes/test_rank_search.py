"""The search by ranks: over noise and over weights, ordered by a reward and by a person in the terminal."""

from __future__ import annotations

import builtins
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gentrain.config import ConfigError, Document, build, register
from gentrain.recipes.base import Stage
from gentrain.recipes.generate import Generate
from gentrain.recipes.person import Person, picture
from gentrain.recipes.rank_search import RankSearch
from gentrain.rewards.base import Asked, Networks, Reward
from gentrain.training.loop import train
from gentrain.training.run import save_config
from gentrain.training.world import World
from tests.distributed.cases import run_of

SAMPLER = {"name": "ddim", "steps": 2, "eta": 1}


@register("test_bright_threes")
@dataclass
class BrightThrees(Reward):
    """Brightness of a 3, darkness of all else."""

    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    def __call__(self, images: Tensor, asked: Asked, networks: Networks) -> Tensor:
        level = ((images.clamp(-1, 1) + 1) / 2).flatten(1).mean(1)
        return torch.where(asked["label"] == 3, level, -level)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("run")
    model = {"name": "unet", "channels": [8, 16], "attention": [], "norm_groups": 4}
    training = {"samples": 32, "batch_size": 16, "log_every": 16, "preview_every": 0, "ema_half_life": 8}
    settings = {"method": "diffusion", "data": "digits", "path": "variance_preserving", "prediction": "eps", "sampler": SAMPLER}
    found = run_of({**settings, "model": model, "engine": "torch", "training": training, "output": str(directory)})
    save_config(found)
    train(found, World(0, 1, torch.device("cpu")), lambda: False)
    return str(directory)


def search(run: str, **settings: Any) -> RankSearch:
    values = {"name": "rank_search", "run": run, "labels": [3, 7], "candidates": 4, "best": 2, "tries": 2, **settings}
    return build(Stage, Document(values, "x.yaml"))  # type: ignore[return-value, type-abstract]


def told(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "found.json").read_text())
    return found


def test_no_image_is_worse_than_before_and_some_are_better(run: str, tmp_path: Path) -> None:
    search(run, reward="brightness", rounds=3).execute(tmp_path)
    found, x = told(tmp_path), load_file(tmp_path / "samples.safetensors")["x"]
    assert all(after > before for before, after in zip(found["before"], found["after"], strict=True))
    assert ((x.clamp(-1, 1) + 1) / 2).flatten(1).mean(1).tolist() == pytest.approx(found["after"], abs=1e-5)
    assert (tmp_path / "grid.png").is_file() and not (tmp_path / "checkpoints").exists()


def test_each_image_is_judged_as_what_was_asked(run: str, tmp_path: Path) -> None:
    search(run, reward="test_bright_threes", rounds=3).execute(tmp_path)
    found, x = told(tmp_path), load_file(tmp_path / "samples.safetensors")["x"]
    three, seven = ((x.clamp(-1, 1) + 1) / 2).flatten(1).mean(1).tolist()
    assert found["after"] == pytest.approx([three, -seven], abs=1e-5)
    assert all(after > before for before, after in zip(found["before"], found["after"], strict=True))


def test_weights_that_are_found_are_a_run_that_draws_the_same(run: str, tmp_path: Path) -> None:
    adapter = {"rank": 2, "targets": ["convolutions"]}
    search(run, reward="brightness", adapter=adapter, radius=0.05, rate=0.1, rounds=3).execute(tmp_path / "found")
    found = told(tmp_path / "found")
    assert sum(found["after"]) > sum(found["before"]) + 1e-3  # one change for both: a single image may lose
    x = load_file(tmp_path / "found" / "samples.safetensors")["x"]
    Generate(run=str(tmp_path / "found"), count=2, labels=[3, 7]).execute(tmp_path / "drawn")
    torch.testing.assert_close(load_file(tmp_path / "drawn" / "samples.safetensors")["x"], x, rtol=1e-5, atol=1e-4)
    Generate(run=run, count=2, labels=[3, 7]).execute(tmp_path / "former")
    former = load_file(tmp_path / "former" / "samples.safetensors")["x"]
    assert ((former.clamp(-1, 1) + 1) / 2).flatten(1).mean(1).tolist() == pytest.approx(found["before"], abs=1e-5)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the person will say; asked once more, the input has ended."""
    lines: list[str] = []

    def say(*prompt: object) -> str:
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr(builtins, "input", say)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    return lines


def test_a_person_orders_candidates_and_is_asked_again_until_it_is_an_order(answers: list[str], capsys: Any) -> None:
    answers += ["1 1", "0 2", "3", "5 1", "-1 2", "x y", "", " 3  1 ", "2 4"]
    images = torch.zeros(4, 2, 1, 1, 6, 6)
    values = Person()(images, 2)
    assert values.T.tolist() == [[3, 0, 4, 0], [0, 4, 0, 3]] and answers == []
    assert capsys.readouterr().out.count("Expected 2 different numbers from 1 to 4.") == 7
    answers.append("2")
    assert Person()(images[:3, :1], 1).flatten().tolist() == [0, 3, 0]


def test_a_person_that_likes_what_a_reward_likes_finds_the_same(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = []

    def by_brightness(self: Person, images: Tensor, named: int) -> Tensor:
        """As ranks, of which the rest are told to be alike."""
        questions.append((len(images), named))
        score = ((images.clamp(-1, 1) + 1) / 2).flatten(3).mean(3).mean(2)
        ranks = torch.zeros_like(score)
        order = score.argsort(dim=0, descending=True, stable=True)[:named]
        return ranks.scatter(0, order, torch.arange(len(images), 0, -1.0)[:named, None].expand_as(order))

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(Person, "__call__", by_brightness)
    search(run, rounds=2).execute(tmp_path / "person")
    search(run, rounds=2, reward="brightness").execute(tmp_path / "reward")
    person, reward = (load_file(tmp_path / name / "samples.safetensors")["x"] for name in ("person", "reward"))
    assert torch.equal(person, reward)
    assert questions == [(4, 2), (3, 1)] * 2  # of the candidates the best two, of the line search the best
    assert told(tmp_path / "person")["oracle"] == "a person"


def test_without_a_terminal_or_answers_a_person_cannot_be_asked(
    run: str, tmp_path: Path, answers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"reward: the terminal's input has ended"):
        search(run).execute(tmp_path)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    with pytest.raises(ConfigError, match=r"reward: a person answers in a terminal.* name a reward"):
        search(run).execute(tmp_path)


def test_pictures_show_two_rows_to_a_line_and_are_shrunk() -> None:
    image = torch.tensor([[-1.0, 1.0], [1.0, -1.0], [0.0, 3.0]]).reshape(1, 1, 3, 2)
    text = picture(image)
    assert text.plain == "▀▀\n"
    styles = [(span.style.color.triplet, span.style.bgcolor.triplet) for span in text.spans]  # type: ignore[union-attr]
    assert styles == [((0, 0, 0), (255, 255, 255)), ((255, 255, 255), (0, 0, 0))]
    assert picture(torch.rand(2, 3, 64, 64)).plain == ("▀" * 64 + "\n") * 16


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"best": 5}, "best: there are 4 candidates"),
        ({"labels": []}, "labels: name at least one"),
        ({"weights": {"judge": "x"}}, "weights: a person reads no networks"),
        ({"adapter": {"rank": 0}}, "adapter.rank: a change of rank 0"),
    ],
)
def test_mistakes_are_told_as_the_configuration_loads(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search("x", **settings)


def test_labels_and_runs_that_do_not_fit_are_refused(run: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="labels: class 12 does not exist"):
        search(run, labels=[12], reward="brightness").execute(tmp_path)
    with pytest.raises(ConfigError, match=r"weights.judge: the reward reads the network judge"):
        search(run, reward="classifier").execute(tmp_path)
