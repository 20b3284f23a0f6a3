"""Each of the ten digits of MNIST-5k is forgotten once, from one teacher, one one-step student and one judge, those of the quickstart.

80 steps of `sfd` as configs/mnist5k/sfd.yaml has them, for each digit with one that it is easily taken for in its place; the 7 is not
to be drawn as a 9, for the judge reads 2 in 100 of the student's own 9s as a 7, and could tell no forgetting below that. 5,000 one-step
samples of the digit and 1,000 of the nine others, the same noise before and after. No teacher, student or judge is trained twice; the
seed of training is one.

Asked: the digit in at most 2 % of what is asked for it, upper end of the interval; the others read as well as before and at no greater
Frechet distance, within the intervals of the student before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gentrain.cluster.generation import generate
from gentrain.cluster.launch import launch
from gentrain.metrics.base import Metric
from gentrain.metrics.unlearning import forget_accuracy, override_rate, remain_accuracy, remain_distance
from gentrain.recipes.base import load_recipe, run_recipe
from gentrain.recipes.evaluate import load_judge, read_held_out
from gentrain.recipes.features import apply_network
from gentrain.training.loop import Outcome
from gentrain.training.run import load_run, open_run

CONFIGS = Path(__file__).parents[2] / "configs"
OVERRIDES = {0: 6, 1: 7, 2: 7, 3: 8, 4: 9, 5: 6, 6: 0, 7: 1, 8: 3, 9: 4}
FORGOTTEN, OTHERS = 5_000, 1_000  # samples of the digit, and of the others together


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """judge, generator and student of the quickstart, in one process."""
    out = tmp_path_factory.mktemp("quickstart")
    inline = [f"stages.{name}.run.cluster.{key}" for name in ("generator", "student") for key in ("place=inline", "workers=1")]
    recipe = load_recipe(CONFIGS / "quickstart.yaml", [f"output={out}", *inline])
    recipe.stages = {name: recipe.stages[name] for name in ("judge", "generator", "student")}
    run_recipe(recipe, lambda line: None)
    return out


def labels_of(forgotten: int) -> Tensor:
    others = torch.tensor([digit for digit in range(10) if digit != forgotten])
    return torch.cat([torch.full((FORGOTTEN,), forgotten), others.repeat(-(-OTHERS // 9))[:OTHERS]])


def measured(quickstart: Path, run: Path, forgotten: int, override: int) -> tuple[Metric, Metric, Metric, Metric]:
    """forget accuracy, override rate, remain accuracy and Frechet distance of the nine others."""
    judge, data = load_judge(str(quickstart / "judge"), None)
    held_out, labels = read_held_out(data, 10_000), labels_of(forgotten)
    x = generate(run, open_run(run).sampler, labels)
    read = apply_network(judge, x).argmax(1)
    features = [apply_network(judge.features, images) for images in (x, held_out["x"])]
    return (
        forget_accuracy(read, labels, forgotten, "forget"),
        override_rate(read, labels, forgotten, override, "override"),
        remain_accuracy(read, labels, [forgotten], "remain"),
        remain_distance(features[0], labels, features[1], held_out["label"], [forgotten], "distance"),
    )


@pytest.mark.gate
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("digit", range(10))
def test_a_digit_is_forgotten(quickstart: Path, tmp_path: Path, digit: int, record_property: Callable[[str, object], None]) -> None:
    given = {"teacher": "generator", "fake_score": "student", "student": "student"}
    weights = [f"roles.{role}.weights={quickstart / name}" for role, name in given.items()]
    changes = [f"method.forget='{digit}'", f"method.override='{OVERRIDES[digit]}'", "training.preview_every=0", "engine=torch"]
    run = load_run(CONFIGS / "mnist5k/sfd.yaml", [f"output={tmp_path / 'run'}", *weights, *changes])
    assert launch(run) is Outcome.FINISHED
    before = measured(quickstart, quickstart / "student", digit, OVERRIDES[digit])
    after = measured(quickstart, tmp_path / "run", digit, OVERRIDES[digit])
    for name, old, new in zip(("forget", "override", "remain", "distance"), before, after, strict=True):
        record_property(name, {"before": [old.value, old.low, old.high], "after": [new.value, new.low, new.high]})
    assert after[0].high <= 0.02
    assert after[2].value >= before[2].low
    assert after[3].value <= before[3].high
