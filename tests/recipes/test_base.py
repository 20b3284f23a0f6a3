"""Recipes from beginning to end: on a toy without a judge and on small digits with one; what runs again, when, and what is said."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gentrain.config import ConfigError
from gentrain.data.toys import Rings
from gentrain.recipes.base import STAGES, Stopped, load_recipe, read_states, run_recipe
from gentrain.recipes.evaluate import Evaluate
from gentrain.report import write_report
from gentrain.training.loop import Trainer

TOY = """
stages:
  generator:
    name: train
    run:
      method: flow_matching
      data: {name: rings, held_out: 200}
      model: {name: mlp, width: 8, depth: 1}
      engine: torch
      training: {samples: 96, batch_size: 16, log_every: 16}
  rough: {name: generate, run: '${output:generator}', count: 150, sampler: {name: euler, steps: 2}}
  fine: {name: generate, run: '${output:generator}', count: 150, sampler: {name: euler, steps: 4}}
  scores: {name: evaluate, data: {name: rings, held_out: 200}, samples: {rough: '${output:rough}', fine: '${output:fine}'}}
"""

DIGITS = """
stages:
  judge:
    name: train
    run:
      {method: classifier, data: digits, model: {name: cnn, channels: [8]}, engine: torch, training: {samples: 200, batch_size: 50}}
  generator:
    name: train
    run:
      method: flow_matching
      data: digits
      model: {name: unet, channels: [8, 8], attention: []}
      engine: torch
      training: {samples: 32, batch_size: 16, log_every: 16, preview_every: 16, preview_count: 10}
  drawn: {name: generate, run: '${output:generator}', count: 150, sampler: {name: euler, steps: 2, guidance: 2}}
  scores: {name: evaluate, judge: '${output:judge}', samples: {drawn: '${output:drawn}'}}
  pipeline: {name: export, run: '${output:generator}', scores: '${output:scores}'}
"""


def _run(folder: Path, *overrides: str, text: str = TOY) -> dict[str, str]:
    """Runs the recipe in folder/out; what was said about each stage first."""
    (folder / "toy.yaml").write_text(text)
    said: list[str] = []
    with contextlib.chdir(folder):  # outputs keep their names, so that a copied directory is as good as the original
        run_recipe(load_recipe("toy.yaml", ["output=out", *overrides]), said.append)
    return {line.partition(": ")[0]: line.partition(": ")[2] for line in reversed(said)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    _run(folder)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "out", tmp_path / "out")
    return tmp_path


def _states(folder: Path) -> dict[str, dict[str, Any]]:
    return read_states(folder / "out")


ALL_SKIPPED = dict.fromkeys(["generator", "rough", "fine", "scores"], "finished before, skipped")


def test_every_stage_leaves_what_the_report_reads(finished: Path) -> None:
    out = finished / "out"
    assert {name: (state["kind"], state["status"]) for name, state in _states(finished).items()} == {
        "generator": ("train", "finished"), "rough": ("generate", "finished"),
        "fine": ("generate", "finished"), "scores": ("evaluate", "finished"),
    }  # fmt: skip
    assert all(state["seconds"] > 0 and state["reason"] == "not run yet" for state in _states(finished).values())
    lines = [json.loads(line) for line in (out / "generator" / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [16, 32, 48, 64, 80, 96]
    assert (out / "generator" / "checkpoints" / "000000000096").is_dir()
    assert json.loads((out / "generator" / "environment.json").read_text())["torch"] == torch.__version__
    drawn = load_file(out / "rough" / "samples.safetensors")
    assert drawn["x"].shape == (150, 2) and drawn["label"].tolist() == [0, 1, 2] * 50
    assert not torch.equal(drawn["x"], load_file(out / "fine" / "samples.safetensors")["x"])
    assert json.loads((out / "rough" / "info.json").read_text())["sampler"]["steps"] == 2
    scores = json.loads((out / "scores" / "metrics.json").read_text())
    kinds = ["sliced Wasserstein", "energy distance", "precision", "recall", "coverage", "density"]
    assert [metric["name"] for metric in scores["metrics"]] == [f"{kind}, {name}" for name in ("rough", "fine") for kind in kinds]
    assert all(metric["low"] <= metric["high"] for metric in scores["metrics"])
    assert [metric["better"] for metric in scores["metrics"]] == ["lower", "lower", *["higher"] * 4] * 2
    assert "energy distance, fine" in write_report(out).read_text()


def test_a_second_run_skips_everything(copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (copy / "out").rglob("*") if path.is_file()}
    assert _run(copy) == ALL_SKIPPED
    changed = {path.name for path in before if path.stat().st_mtime_ns != before[path]}
    assert changed <= {"recipe.yaml", STAGES}


def test_what_changes_no_weights_runs_nothing_again(copy: Path) -> None:
    overrides = [
        "run.cluster.cpus_per_worker=2",
        "run.training.log_every=32",
        "run.training.checkpoint_every=32",
        "run.training.keep_last=5",
    ]
    assert _run(copy, *(f"stages.generator.{override}" for override in overrides), "stages.fine.actors=2") == ALL_SKIPPED


def test_a_changed_stage_runs_again_with_what_depends_on_it_and_its_former_output_is_kept(copy: Path) -> None:
    former = _states(copy)["rough"]["fingerprint"]
    samples = (copy / "out" / "rough" / "samples.safetensors").read_bytes()
    said = _run(copy, "stages.rough.sampler.steps=3")
    assert said["generator"] == said["fine"] == "finished before, skipped"
    assert said["rough"] == "runs again: sampler.steps changed"
    assert said["scores"] == "runs again: rough ran again"
    aside = copy / "out" / f"rough.{former[:8]}"
    assert (aside / "samples.safetensors").read_bytes() == samples
    assert (copy / "out" / "rough" / "samples.safetensors").read_bytes() != samples
    assert _states(copy)["rough"]["reason"] == "runs again: sampler.steps changed"
    said = _run(copy)
    assert said["rough"] == "runs again: sampler.steps changed" and (aside / "samples.safetensors").read_bytes() == samples
    assert (copy / "out" / "rough" / "samples.safetensors").read_bytes() == samples


def test_a_changed_training_runs_everything_again(copy: Path) -> None:
    said = _run(copy, "stages.generator.run.seed=1", "stages.generator.run.model.width=9")
    assert said["generator"] == "runs again: run.model.width, run.seed changed"
    assert said["rough"] == said["fine"] == "runs again: generator ran again"
    assert said["scores"] == "runs again: rough, fine ran again"


def test_an_output_of_a_stages_run_is_said_to_be_unused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "toy.yaml").write_text(TOY)
    recipe = load_recipe(tmp_path / "toy.yaml", ["output=out", "stages.generator.run.output=elsewhere"])
    assert caplog.messages == ["command line: stages.generator.run.output is not used: the run's directory is out/generator"]
    assert recipe.stages["generator"].run.output == "out/generator"  # type: ignore[attr-defined]


def test_the_name_of_an_output_that_is_gone_is_told(copy: Path) -> None:
    shutil.rmtree(copy / "out" / "fine")
    assert _run(copy) == ALL_SKIPPED | {"fine": "runs again: its output is gone"}
    assert (copy / "out" / "fine" / "samples.safetensors").is_file()


def test_a_stage_that_left_the_recipe_is_forgotten_and_its_output_stays(copy: Path) -> None:
    _run(copy, text=TOY.partition("  scores")[0])
    assert list(_states(copy)) == ["generator", "rough", "fine"]
    assert (copy / "out" / "scores" / "metrics.json").is_file()
    assert _run(copy) == ALL_SKIPPED | {"scores": "not run yet"}
    assert (copy / "out" / "scores.unknown" / "metrics.json").is_file()  # a training would go on from weights of other settings


def test_a_stopped_training_goes_on_to_the_same_weights(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Trainer.fit

    def fit_half(self: Trainer, callbacks: Any, should_stop: Any) -> Any:
        return asked(self, callbacks, lambda: self.clock.samples >= 48)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", fit_half)
        with pytest.raises(Stopped):
            _run(tmp_path)
    assert {name: state["status"] for name, state in _states(tmp_path).items()} == {"generator": "stopped"}
    spent = _states(tmp_path)["generator"]["seconds"]
    assert (tmp_path / "out/generator/checkpoints/000000000048").is_dir()
    said = _run(tmp_path)
    assert said["generator"] == "going on: the last attempt was stopped" and said["scores"] == "not run yet"
    assert _states(tmp_path)["generator"]["seconds"] > spent
    for name in ("model.weights.00000", "model.ema.00000"):
        file = f"out/generator/checkpoints/000000000096/{name}.safetensors"
        assert (tmp_path / file).read_bytes() == (finished / file).read_bytes()
    lines = (tmp_path / "out/generator/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["samples"] for line in lines] == [16, 32, 48, 64, 80, 96]


@pytest.mark.parametrize("error, status, said", [(ValueError("no"), "failed", "failed"), (KeyboardInterrupt(), "stopped", "was stopped")])
def test_a_stage_that_fails_is_recorded_and_runs_again(
    copy: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: str, said: str
) -> None:
    def fail(*arguments: Any) -> Any:
        raise error

    shutil.rmtree(copy / "out" / "rough")
    with monkeypatch.context() as patch:
        patch.setattr("gentrain.recipes.generate.generate", fail)
        with pytest.raises(type(error)):
            _run(copy)
    assert _states(copy)["rough"]["status"] == status
    assert _states(copy)["rough"].get("error") == ("no" if status == "failed" else None)
    reason = ": no" if status == "failed" else ""
    assert f"rough</strong> {status} before it was finished{reason};" in write_report(copy / "out").read_text()
    assert _run(copy) == ALL_SKIPPED | {"rough": f"going on: the last attempt {said}"}


def test_a_sampler_that_cannot_draw_from_the_run_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    text = TOY.replace("{name: euler, steps: 4}", "{name: heun, spacing: karras}")
    with pytest.raises(ConfigError, match=r"toy\.yaml: stages\.fine\.sampler: rectified_flow ends in pure noise, where Karras spacing"):
        _run(tmp_path, text=text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        ("judge=${output:generator}", "judge: out/generator will be a run of flow_matching; a judge is one of `classifier`"),
        ("judge=${output:drawn}", "judge: out/drawn will hold samples; name a run of the method `classifier`"),
        ("samples.drawn=${output:generator}", "samples.drawn: out/generator will be a run, that of a stage `train`, and no samples"),
    ],
)
def test_a_stage_that_reads_what_will_not_be_there_is_told_before_anything_is_trained(tmp_path: Path, change: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"command line: stages\.scores\.{said}"):
        _run(tmp_path, f"stages.scores.{change}", text=DIGITS)
    assert not (tmp_path / "out").exists()


def test_a_stage_that_was_killed_runs_again(copy: Path) -> None:
    states = _states(copy)
    states["fine"]["status"] = "running"  # what a kill leaves behind
    (copy / "out" / STAGES).write_text(json.dumps(states))
    assert _run(copy) == ALL_SKIPPED | {"fine": "going on: the last attempt was killed"}


@pytest.mark.parametrize("text", ["{", "[]", '{"generator": 3}', '{"generator": {"status": "finished"}}'])
def test_a_damaged_record_is_told_and_nothing_runs(copy: Path, text: str) -> None:
    (copy / "out" / STAGES).write_text(text)
    with pytest.raises(ConfigError, match=r"stages\.json: damaged .*restore it, or move the directory away"):
        _run(copy)
    assert (copy / "out" / STAGES).read_text() == text


def test_plugins_of_a_recipe_and_of_its_runs_are_loaded_and_stay_with_the_runs(tmp_path: Path) -> None:
    for name in ("near", "far"):
        (tmp_path / f"{name}.py").write_text(
            "from dataclasses import dataclass\nfrom gentrain.config import register\nfrom gentrain.data.toys import Rings\n"
            f"@register('{name}_rings')\n@dataclass\nclass Mine(Rings):\n    '''Rings.'''\n"
        )
    (tmp_path / "run.yaml").write_text(
        "plugins: [near.py]\nmethod: flow_matching\ndata: near_rings\nmodel: mlp\nengine: torch\ntraining: {samples: 16}\n"
    )
    text = "plugins: [far.py]\nstages:\n  a: {name: train, run: {base: run.yaml}}\n"
    text += "  b: {name: train, run: {base: run.yaml, data: far_rings}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    for stage in recipe.stages.values():
        assert stage.run.plugins == [str(tmp_path / "far.py"), str(tmp_path / "near.py")]  # type: ignore[attr-defined]
        assert "plugins" not in stage.settings()["run"]
    run = recipe.stages["b"].run  # type: ignore[attr-defined]
    assert run.data.registered_name == "far_rings"


def _refuses_what_the_judge_cannot_judge(out: Path, few: Path) -> None:
    with pytest.raises(ConfigError, match=r"judge: .* judges samples of shape \(1, 8, 8\) .* these are of shape \(2,\)"):
        Evaluate(samples={"drawn": str(out / "drawn")}, judge=str(out / "judge"), data=Rings()).execute(out / "none")
    few.mkdir()
    save_file({key: value[:100] for key, value in load_file(out / "drawn/samples.safetensors").items()}, few / "samples.safetensors")
    with pytest.raises(ConfigError, match=r"samples\.few: 100 samples .* are too few for the Frechet distance of 128 features"):
        Evaluate(samples={"few": str(few)}, judge=str(out / "judge")).execute(out / "none")
    assert not (out / "none").exists()


def test_digits_with_a_judge(tmp_path: Path) -> None:
    _run(tmp_path, text=DIGITS)
    out = tmp_path / "out"
    assert (out / "generator/samples/000000000032.png").is_file() and (out / "drawn/grid.png").is_file()
    metrics = {metric["name"]: metric for metric in json.loads((out / "scores/metrics.json").read_text())["metrics"]}
    kinds = ["class accuracy", "Frechet distance", "kernel distance", "precision", "recall", "coverage", "density"]
    assert list(metrics) == [*(f"{kind}, drawn" for kind in kinds), "accuracy of the judge on held-out data"]
    assert all(metric["low"] <= metric["value"] <= metric["high"] for metric in metrics.values())
    assert metrics["class accuracy, drawn"]["better"] == "higher"
    assert ["steps, guidance" in metric["definition"] for metric in metrics.values()] == [True] * 7 + [False]
    assert (out / "pipeline/model_index.json").is_file() and "class accuracy, drawn" in (out / "pipeline/README.md").read_text()
    assert set(_run(tmp_path, text=DIGITS).values()) == {"finished before, skipped"}
    _refuses_what_the_judge_cannot_judge(out, tmp_path / "few")
    said = _run(tmp_path, "stages.judge.run.seed=3", text=DIGITS)
    assert [name for name, line in said.items() if line.startswith("runs again")] == ["pipeline", "scores", "judge"]
    page = write_report(out).read_text()
    assert "Frechet distance, drawn" in page and "data:image/png" in page
