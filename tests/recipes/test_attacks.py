"""relearning and inversion: what learns, what stays, when a class counts as back, and what an inversion finds in closed form."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gentrain.config import ConfigError
from gentrain.data.toys import Rings
from gentrain.models.base import Codec, Condition
from gentrain.models.denoiser import Denoiser
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.recipes.attacks import Inversion, Relearning, Target, embedding, read_finding
from gentrain.recipes.base import load_recipe, run_recipe
from gentrain.samplers.euler import Euler
from gentrain.training.roles import load_weights

RECIPE = """
stages:
  judge:
    name: train
    run:
      {method: classifier, data: digits, model: {name: cnn, channels: [8]}, engine: torch, training: {samples: 200, batch_size: 50}}
  model:
    name: train
    run:
      method: flow_matching
      data: digits
      model: {name: unet, channels: [8, 8], attention: []}
      engine: torch
      adapter: {rank: 2, targets: [linear]}
      sampler: {name: euler, steps: 2}
      training: {samples: 32, batch_size: 16}
  relearning:
    name: relearning
    <<: &attack {run: "${output:model}", forget: 3, judge: "${output:judge}", images: 20, attempts: 2, count: 20, batch_size: 8}
    steps: [1, 2]
    back: 1.0
  inversion:
    name: inversion
    <<: *attack
    steps: 2
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacks")
    (folder / "toy.yaml").write_text(RECIPE)
    with contextlib.chdir(folder):
        run_recipe(load_recipe("toy.yaml", [f"output={folder / 'out'}"]), lambda line: None)
    return folder / "out"


def test_what_is_written(out: Path) -> None:
    from gentrain.models.adapters import digest_of

    relearning, inversion = (read_finding(str(out / name)) for name in ("relearning", "inversion"))
    assert relearning.weights == inversion.weights == digest_of(load_weights(str(out / "model")))
    assert relearning.metric.name == "steps until relearnt" and relearning.metric.better == "higher"
    assert "never came so far in 2 steps" in relearning.metric.definition and relearning.metric.low == relearning.metric.high == 2
    assert [list(attempt) for attempt in relearning.curve["shares"]] == [["0", "1", "2"]] * 2
    assert inversion.metric.name == "success of inversion" and inversion.metric.better == "lower" and len(inversion.curve["shares"]) == 2
    for name in ("relearning", "inversion"):
        assert json.loads((out / name / "metrics.json").read_text())["metrics"][0]["name"] == read_finding(str(out / name)).metric.name
        assert (out / name / "grid.png").is_file()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"forget": 11}, "forget: there is no class 11"),
        ({"data": "rings"}, "judge: .* judges samples of shape"),
        ({"run": "judge"}, "run: .* draws nothing of the shape"),
    ],
)
def test_mistakes_are_told(out: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    change = {key: Rings() if value == "rings" else str(out / value) if key == "run" else value for key, value in change.items()}
    stage = Inversion(**{"run": str(out / "model"), "forget": 3, "judge": str(out / "judge"), **change})
    with pytest.raises(ConfigError, match=said):
        stage.execute(tmp_path)


def test_steps_are_in_order() -> None:
    with pytest.raises(ConfigError, match="ascending"):
        Relearning(run="r", forget=3, judge="j", steps=[2, 1])


# --- in closed form -----------------------------------------------------------------------------------------------------------

PATH = RectifiedFlow()
IMAGES = torch.tensor([[2.0, -1.0], [4.0, 1.0]])  # of the class 1


class Table(nn.Module):
    """x0 is the embedding of the label, times a weight that could learn as well."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(4, 2)
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        assert condition is not None
        if "prompt" in condition:
            return condition["prompt"].mean(1) * self.weight
        return self.labels(condition["label"]) * self.weight


class Prompts(Codec):
    takes_prompts = True

    def condition(self, labels: Tensor, prompts: Any = None) -> Condition:
        assert prompts is not None
        return {"prompt": torch.zeros(len(labels), 3, 2), "null": torch.tensor([prompts[place] == "" for place in labels.tolist()])}


def target_of(codec: type[Codec] = Codec) -> Target:
    torch.manual_seed(0)
    data = Rings()
    denoiser = Denoiser(Table().requires_grad_(False), PATH, "x0")

    def judge(x: Tensor) -> Tensor:  # reads class 1 near the mean of its images, else 0
        near = ((x - IMAGES.mean(0)).norm(dim=1) < 0.5).float()
        return torch.stack([0.5 * torch.ones(len(x)), near, torch.zeros(len(x))], 1)

    run: Any = SimpleNamespace(path=PATH, output="runs/toy")
    return Target(denoiser, run, codec(data), judge, list(data.class_names), 1, IMAGES, Euler(steps=4))


def stage(kind: type[Inversion] | type[Relearning] = Inversion, **settings: Any) -> Any:
    return kind(**{"run": "r", "forget": 1, "judge": "j", "count": 30, "batch_size": 32, **settings})


@pytest.mark.parametrize("codec", [Codec, Prompts])
def test_an_inversion_finds_the_embedding_whose_error_is_least_and_moves_nothing_else(codec: type[Codec]) -> None:
    """Of an x0 that is the embedding itself that is the mean of the images."""
    target, attack = target_of(codec), stage(steps=300)
    weights = {name: value.clone() for name, value in target.denoiser.network.state_dict().items()}  # type: ignore[attr-defined]
    before = target.draw(30, 0)
    with embedding(target, attack.noise(0, 0, 1), 0.1) as (learned, condition):
        attack._learn(target, 0, learned, condition)
        found = (learned[0] if codec is Codec else learned[0].mean(1))[0]
        torch.testing.assert_close(found, IMAGES.mean(0), atol=0.15, rtol=0)
        assert target.hits(target.draw(30, 0, condition)).all()
        others = target.denoiser.x0(torch.zeros(1, 2), torch.tensor([0.5]), {"label": torch.tensor([2])})
        torch.testing.assert_close(others[0], weights["labels.weight"][2])  # only the forgotten class is given the new vector
    for name, value in target.denoiser.network.state_dict().items():  # type: ignore[attr-defined]
        assert torch.equal(value, weights[name])
    assert torch.equal(target.draw(30, 0), before)


def test_attempts_start_elsewhere() -> None:
    starts = []
    for attempt in range(2):
        with embedding(target_of(), stage().noise(attempt, 0, 1), 0.1) as (learned, _):
            starts.append(learned[0].detach().clone())
    middle = target_of().denoiser.network.labels.weight[:3].mean(0)  # type: ignore[attr-defined]
    assert not torch.equal(*starts)
    assert all(0 < (start[0] - middle).abs().max() < 0.5 for start in starts)


def test_a_network_without_labels_is_refused() -> None:
    target = target_of()
    target.denoiser.network = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="no embedding of labels"), embedding(target, stage().noise(0, 0, 1), 0.1):
        pass


def test_the_class_is_back_at_the_first_step_that_is_looked_at_and_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attempt starts from the weights that were given away, and ends once the class is back."""
    target = target_of()
    attack = stage(Relearning, steps=[1, 2, 4, 100, 200], lr=0.02, attempts=2)
    monkeypatch.setattr(Relearning, "target", lambda self: target)
    monkeypatch.setattr("gentrain.recipes.attacks.load_weights", lambda run: {})
    attack.execute(tmp_path)
    finding = read_finding(str(tmp_path))
    for attempt in finding.curve["shares"]:
        shares = list(attempt.values())
        assert list(attempt)[:4] == ["0", "1", "2", "4"] and shares[-1] >= 0.5 and all(share < 0.5 for share in shares[:-1])
    last = [int(list(attempt)[-1]) for attempt in finding.curve["shares"]]
    assert (finding.metric.low, finding.metric.high) == (min(last), max(last)) and finding.metric.value == sum(last) / 2
    assert 4 < last[0] <= 200 and "never" not in finding.metric.definition


def test_a_share_of_exactly_back_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Relearning, "target", lambda self: target_of())
    monkeypatch.setattr(Target, "hits", lambda self, x: torch.arange(len(x)) % 2 == 0)
    monkeypatch.setattr("gentrain.recipes.attacks.load_weights", lambda run: {})
    stage(Relearning, steps=[1, 2], attempts=1, count=4, back=0.5).execute(tmp_path)
    finding = read_finding(str(tmp_path))
    assert finding.metric.value == 0 and finding.curve["shares"] == [{"0": 0.5}]


def test_the_median_lies_between_the_quickest_and_the_slowest() -> None:
    from gentrain.recipes.attacks import _ranked

    assert _ranked([5, None, 2], 80) == (2.0, 5.0, 80.0)


def test_the_strongest_attempt_is_told_by_other_samples_than_those_that_chose_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attempts of equal strength, told apart by luck alone: the luck of the choice must not be in the value."""
    drawn: list[int] = []

    class Lucky:
        x0 = torch.zeros(3, 2)

        def draw(self, count: int, seed: int, condition: Condition | None = None) -> Tensor:
            drawn.append(seed)
            return torch.full((count, 2), float(seed != drawn[0]))  # the first is what is shown without the attack

        def hits(self, x: Tensor) -> Tensor:
            return x[:, 0] > 0  # the samples of the choice, and none that is told

    told: list[Any] = []
    monkeypatch.setattr(Inversion, "target", lambda self: Lucky())
    monkeypatch.setattr(Inversion, "_learn", lambda self, *_: None)
    monkeypatch.setattr(Inversion, "write", lambda self, directory, metric, *_: told.append(metric))
    monkeypatch.setattr("gentrain.recipes.attacks.embedding", lambda *_: contextlib.nullcontext(([], {})))
    Inversion(run="r", forget=0, judge="j", attempts=2, count=20).execute(tmp_path)
    assert told[0].value == 0 and "20 samples of the strongest of 2" in told[0].definition
    assert len(set(drawn)) == 2 and drawn.count(drawn[0]) == 3  # one seed for what is shown and told, another for the choice
