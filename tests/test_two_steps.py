"""Every configuration that comes with gentrain trains: two steps, of a few samples, of each run that it is or that its stages are.

What a run begins with is made as its file says, in as few steps: the stages before it, and the runs and recipes that it names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from emoji import EMOJI_DATA

from gentrain.cluster.launch import launch
from gentrain.cluster.sweeps import is_sweep, load_sweep
from gentrain.recipes.base import RecipeConfig, Stage, _dependencies, _texts, is_recipe, load_recipe
from gentrain.recipes.train import Train
from gentrain.recipes.train_best import TrainBest
from gentrain.training.cluster import Cluster
from gentrain.training.loop import Outcome
from gentrain.training.run import RunConfig, load_run
from tests.test_configs import CONFIGS, PIECES, ROOT

pytestmark = pytest.mark.timeout(1200)

BATCH = 8
FEWER: dict[str, int] = {"count": 32, "steps": 2, "train": 64, "held_out": 8, "actors": 0}  # of data, other stages and their samplers
EMOJI = 16  # one of so many is drawn, embedded, encoded; and those that configurations ask for
# Directories that are not called like the file that fills them: the file, and its stage.
ELSEWHERE = {"runs/tokens": ("recipes/digits_as_tokens", "tokens"), "runs/tokens_model": ("recipes/digits_as_tokens", "start")}
ONE_PLACE = ("emoji_", "unlearn_pipeline")  # recipes that go on from each other


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    root = tmp_path_factory.mktemp("shipped")
    (root / "configs").symlink_to(ROOT / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        drawn = {text: entry for i, (text, entry) in enumerate(EMOJI_DATA.items()) if i % EMOJI == 0 or entry["en"] in (":cat:", ":dog:")}
        patch.setattr("emoji.EMOJI_DATA", drawn)
        yield


def shorten(run: RunConfig) -> None:
    training = run.training
    training.batch_size, training.samples = BATCH, 2 * BATCH
    training.log_every, training.checkpoint_every, training.preview_every = BATCH, 2 * BATCH, 0
    training.data_workers, run.cluster = 0, Cluster()
    fewer(run.data)
    fewer(run.sampler)


def fewer(part: object) -> None:
    for key, most in FEWER.items():
        if isinstance(value := getattr(part, key, None), int):
            setattr(part, key, min(value, most))


def check(directory: Path) -> None:
    lines: list[dict[str, Any]] = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [BATCH, 2 * BATCH]
    for line in lines:
        assert all(math.isfinite(value) for key, value in line.items() if key.startswith("loss/"))
        norms = [value for key, value in line.items() if key.startswith("grad_norm/")]
        assert norms and any(norm > 0 for norm in norms)
    assert [int(each.name) for each in (directory / "checkpoints").iterdir() if each.name.isdigit()] == [2 * BATCH]


def ready(directory: str) -> None:
    """Makes what a run reads, where it is not there yet."""
    if Path(directory).exists():
        return
    name, stage = (*Path(directory).relative_to("runs").parts, None)[:2]
    if directory in ELSEWHERE:
        file, stage = ELSEWHERE[directory]
        train(ROOT / "configs" / f"{file}.yaml", stage)
        Path(directory).symlink_to(f"{Path(file).stem}/{stage}")
        return
    (file,) = [each for each in CONFIGS if each.stem == name and is_recipe(each) == (stage is not None)]
    train(file, stage)


def train(path: Path, only: str | None = None) -> None:
    """Trains a run, or the runs of a recipe: all of them, or what leads to the stage `only`."""
    path = Path("configs", path.relative_to(ROOT / "configs"))
    name = path.stem if [each.stem for each in CONFIGS].count(path.stem) == 1 else f"{path.parent.name}-{path.stem}"
    where = [f"output=runs/{'emoji' if path.stem.startswith(ONE_PLACE) else name}"]
    if not is_recipe(path):
        run = load_sweep(path, where).trials[0].run if is_sweep(path) else load_run(path, where)
        for text in _texts(run.method.__dict__ | {name: role.weights for name, role in run.roles.items()} | run.data.__dict__):
            if text.startswith("runs/"):
                ready(text)
        run = load_sweep(path, where).trials[0].run if is_sweep(path) else load_run(path, where)  # once more: what it reads is there now
        shorten(run)
        assert launch(run) is Outcome.FINISHED
        check(run.directory)
        return
    recipe = load_recipe(path, where)
    for name in wanted(recipe, only):
        if (recipe.directory / name).exists():
            continue
        for text in _texts(recipe.stages[name].settings()):
            if text.startswith("runs/") and not Path(text).is_relative_to(recipe.directory):
                ready(text)
        make(load_recipe(path, where).stages[name], recipe.directory / name)


def wanted(recipe: RecipeConfig, only: str | None) -> list[str]:
    """The stages that train, or the one named, and what they need, in order."""
    found = {name for name, stage in recipe.stages.items() if (isinstance(stage, Train) if only is None else name == only)}
    for name in reversed(recipe.stages):
        if name in found:
            found.update(_dependencies(recipe, recipe.stages[name]))
    return [name for name in recipe.stages if name in found]


def make(stage: Stage, directory: Path) -> None:
    if isinstance(stage, Train | TrainBest):
        shorten(stage.run)
    fewer(stage)
    if isinstance(stage, TrainBest):
        stage.count = 150  # more than the judge has features
    fewer(getattr(stage, "sampler", None))
    stage.execute(directory)
    if isinstance(stage, Train):
        check(directory)


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT)) for path in CONFIGS if path.parent.name not in PIECES])
def test_a_shipped_configuration_trains_two_steps(path: str) -> None:
    train(ROOT / path)
