"""From a teacher to an unlearned one-step student on small digits: the stage `unlearning`, its gate, and what export makes of it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gentrain.config import ConfigError
from gentrain.data.toys import Rings
from gentrain.metrics.base import Metric
from gentrain.models.mlp import MLP
from gentrain.recipes.adopt import Adopt
from gentrain.recipes.base import load_recipe, run_recipe
from gentrain.recipes.evaluate import refuse_runs
from gentrain.recipes.export import Export
from gentrain.recipes.oracle import _law_of, oracle_distances
from gentrain.recipes.unlearning import Gate, Measured, Release, Unlearning, statement, unmet
from gentrain.report import write_report
from gentrain.training.roles import load_weights

RECIPE = """
stages:
  judge:
    name: train
    run:
      {method: classifier, data: digits, model: {name: cnn, channels: [8]}, engine: torch, training: {samples: 200, batch_size: 50}}
  teacher:
    name: train
    run: &run
      method: flow_matching
      data: digits
      model: {name: unet, channels: [8, 8], attention: []}
      engine: torch
      training: {samples: 32, batch_size: 16, log_every: 16}
  oracle:
    name: train
    run: {<<: *run, data: {name: chosen, data: digits, leave_out: [3]}}
  student:
    name: train
    run: {<<: *run, method: {name: distribution_matching, generator_loss: sid}, roles: {teacher: {weights: '${output:teacher}'}}}
  unlearned:
    name: train
    run:
      <<: *run
      method: {name: sfd, forget: 3, override: classifier}
      roles:
        teacher: {weights: '${output:teacher}'}
        fake_score: {weights: '${output:student}'}
        student: {weights: '${output:student}'}
        judge: {weights: '${output:judge}', model: {name: cnn, channels: [8]}}
  teacher_drawn: {name: generate, run: '${output:teacher}', count: 400, sampler: {name: euler, steps: 2}}
  student_drawn: {name: generate, run: '${output:student}', count: 400}
  unlearned_drawn: {name: generate, run: '${output:unlearned}', count: 400}
  relearning:
    name: relearning
    run: ${output:unlearned}
    forget: 3
    judge: ${output:judge}
    attempts: 1
    count: 20
    batch_size: 8
    steps: [1, 2]
  scores:
    name: unlearning
    forget: "3"
    attacks: ["${output:relearning}"]
    override: "8"
    judge: ${output:judge}
    before: ${output:student_drawn}
    after: ${output:unlearned_drawn}
    others: {teacher: '${output:teacher_drawn}'}
    gate: {forget: 1.0, remain_loss: 1.0, distance_factor: 100.0, distance_floor: 1000000.0}
    oracle: ${output:oracle}
    oracle_count: 18
    oracle_draws: 2
    reference: 400
  pipeline: {name: export, run: '${output:unlearned}', scores: '${output:scores}', gate: '${output:scores}'}
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unlearning")
    (folder / "toy.yaml").write_text(RECIPE)
    with contextlib.chdir(folder):
        run_recipe(load_recipe("toy.yaml", [f"output={folder / 'out'}"]), lambda line: None)
    return folder / "out"


def stage_of(out: Path, **more: Any) -> Unlearning:
    settings = {"forget": 3, "judge": str(out / "judge"), "before": str(out / "student_drawn"), "after": str(out / "unlearned_drawn")}
    return Unlearning(**{**settings, "reference": 400, **more})  # type: ignore[arg-type]


def test_all_sets_are_measured_and_shown(out: Path) -> None:
    metrics = [metric["name"] for metric in json.loads((out / "scores/metrics.json").read_text())["metrics"]]
    kinds = ("forget accuracy", "override rate", "remain accuracy", "Frechet distance of the others", "divergence from the oracle")
    assert metrics == [*(f"{kind}, {name}" for name in ("after", "before", "teacher") for kind in kinds), "steps until relearnt, after"]
    release = json.loads((out / "scores/release.json").read_text())
    assert release["forget"] == "3" and all(check["met"] for check in release["checks"])
    with Image.open(out / "scores/grid.png") as grid:  # a row for each digit; three images of each model and a gap between models
        assert grid.size == ((3 * 4 - 1) * 10 * 2, 10 * 10 * 2)
        # the first row holds the first images of class 0: sample numbers 0, 10, 20 of each set
        after = load_file(out / "unlearned_drawn/samples.safetensors")["x"][0, 0]
        shown = torch.tensor(list(grid.getdata())).reshape(grid.size[1], grid.size[0])[2:18:2, 8 * 20 + 2 : 8 * 20 + 18 : 2]
    torch.testing.assert_close(shown.float(), (after.clamp(-1, 1) + 1) * 127.5, rtol=0, atol=0.51)


def test_the_report_says_whose_samples_the_grid_shows(out: Path) -> None:
    assert "3 samples of each model, from left to right: teacher, before, after; the same noise." in write_report(out).read_text()


def test_the_divergence_is_that_of_the_law_that_each_model_draws_from(out: Path) -> None:
    """0 of the oracle from itself; of a one-step student it is its fake score's, not that of the student, which denoises nothing."""
    runs = {name: str(out / name) for name in ("oracle", "teacher", "student")}
    found = oracle_distances(runs["oracle"], runs, 3, 18, 2)
    assert found["oracle"].value == found["oracle"].high == 0 < found["teacher"].low
    assert "KL(oracle || model)" in found["teacher"].definition
    assert "KL(oracle || fake score of the student)" in found["student"].definition
    denoiser, _ = _law_of(runs["student"])
    weights = load_weights(runs["student"], role="fake_score")
    torch.testing.assert_close(dict(denoiser.network.state_dict()), weights)  # type: ignore[attr-defined]


def test_the_divergence_is_asked_of_the_classes_that_remain(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def watched(truth: Any, other: Any, x0: torch.Tensor, noise: Any, condition: Any, draws: int) -> torch.Tensor:
        seen.append(condition["label"])
        return torch.ones(len(x0), dtype=torch.float64)

    monkeypatch.setattr("gentrain.recipes.oracle.divergence_bound", watched)
    oracle_distances(str(out / "oracle"), {"teacher": str(out / "teacher")}, 3, 18, 2)
    assert torch.cat(seen).tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9] * 2


def test_two_stages_start_from_the_student_and_the_fake_score_of_the_first(out: Path) -> None:
    """And the teacher is the original: roles of the same name are read, of which `student` is no generator of other weights."""
    first, teacher = str(out / "student"), load_weights(str(out / "teacher"))
    fake, student = load_weights(first, role="fake_score"), load_weights(first, role="student")
    name = next(iter(student))
    assert not torch.equal(fake[name], student[name])
    assert torch.equal(student[name], load_weights(first)[name])
    assert torch.equal(load_weights(str(out / "teacher"), role="fake_score")[name], teacher[name])


def test_the_card_states_class_conditions_and_that_it_is_no_guarantee(out: Path) -> None:
    card = (out / "pipeline/README.md").read_text()
    unlearning, limits = card.index("## Unlearning"), card.index("## Limits")
    section = card[unlearning:limits]
    assert unlearning < limits and "Made to forget 3." in section and "no guarantee" in section
    assert "| steps until relearnt | " in section and "No attack was tried" not in section
    assert "It meets the conditions of its release" in section and "| forget accuracy, upper end |" in section


def test_what_does_not_meet_the_gate_is_not_exported_unless_forced(out: Path, tmp_path: Path) -> None:
    stage_of(out, gate=Gate(forget=0.0, remain_loss=1.0, distance_floor=1e6)).execute(tmp_path / "scores")
    export = Export(run=str(out / "unlearned"), gate=str(tmp_path / "scores"))
    with pytest.raises(ConfigError, match=r"gate: not released: forget accuracy, upper end is .*, the limit 0; train on, or set force"):
        export.write(tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()
    export.force = True
    card = (export.write(tmp_path / "pipeline") / "README.md").read_text()
    assert "**It does not meet the conditions of its release** (forget accuracy, upper end" in card and "exported by force" in card


def test_without_a_gate_the_card_claims_nothing(out: Path, tmp_path: Path) -> None:
    card = (Export(run=str(out / "unlearned")).write(tmp_path / "pipeline") / "README.md").read_text()
    assert "Made to forget 3." in card and "nothing is claimed" in card
    plain = (Export(run=str(out / "student")).write(tmp_path / "plain") / "README.md").read_text()
    assert "Unlearning" not in plain


def test_numbers_of_other_weights_open_no_gate(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is about other weights than those of"):
        Export(run=str(out / "student"), gate=str(out / "scores")).write(tmp_path / "pipeline")
    (tmp_path / "release.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"cannot be read .* run the stage `unlearning`"):
        Export(run=str(out / "unlearned"), gate=str(tmp_path)).write(tmp_path / "pipeline")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"forget": 11}, "forget: there is no class 11"),
        ({"override": 3}, "override: 3 is to be forgotten"),
        ({"override": "3"}, "override: '3' is to be forgotten"),
        ({"forget": [3, 5], "override": 8}, "override: expected one class for each of the 2 forgotten ones, got 1"),
        ({"forget": []}, "forget: name at least one class"),
        ({"forget": [3, 5], "oracle": "nowhere"}, "oracle: an oracle is compared for one forgotten class"),
        ({"gate": Gate(inversion=0.1)}, "attacks: the gate asks for success of inversion"),
        ({"attacks": ["nowhere"]}, r"attacks: nowhere/attack.json cannot be read .* run the attack first"),
        ({"oracle": "nowhere"}, "nowhere is not a run's directory"),
        ({"others": {"after": "x"}}, "others.after: `before` and `after` are taken"),
        ({"before": "nowhere"}, "before: nowhere/samples.safetensors does not exist"),
    ],
)
def test_mistakes_are_told(out: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        stage_of(out, **change).execute(tmp_path)


@pytest.mark.parametrize(
    "change, said",
    [
        ("scores.override='3'", "scores.override: '3' is to be forgotten; name another one, or null"),
        ("scores.override=3", "scores.override: '3' is to be forgotten"),  # by number, and by name
        ("scores.override=10", r"scores.override: there is no class 10; the classes are 0, 1, .* \(0 to 9\)"),
        ("scores.forget=eleven", "scores.forget: no class is called 'eleven'; the classes are 0, 1, "),
        ("scores.forget=[]", "scores.forget: name at least one class"),
        ("scores.judge=${output:teacher}", "scores.judge: out/teacher will be a run of flow_matching; a judge is one of `classifier`"),
        (
            "scores.judge=${output:student_drawn}",
            "scores.judge: out/student_drawn will hold samples; name a run of the method `classifier`",
        ),
        (
            "scores.before=${output:student}",
            "scores.before: out/student will be a run, that of a stage `train`, and no samples; name the dir",
        ),
        ("scores.after=${output:unlearned}", "scores.after: out/unlearned will be a run"),
        ("scores.others.teacher=${output:teacher}", "scores.others.teacher: out/teacher will be a run"),
        ("relearning.forget=11", "relearning.forget: there is no class 11; the classes are 0, 1, "),
        ("relearning.judge=${output:teacher}", "relearning.judge: out/teacher will be a run of flow_matching"),
    ],
)
def test_what_cannot_be_is_told_as_the_recipe_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, said: str) -> None:
    (tmp_path / "toy.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"stages\.{said}") as raised:
        load_recipe("toy.yaml", ["output=out", f"stages.{change}"])
    assert raised.value.source == "command line" and not (tmp_path / "out").exists()


def test_an_adopted_pipeline_is_a_run_too() -> None:
    with pytest.raises(ConfigError, match="before: a will be a run, that of a stage `adopt`, and no samples"):
        refuse_runs({Path("a").absolute(): Adopt(MLP(), Rings())}, {"before": "a"})


def test_other_noise_is_refused(out: Path, tmp_path: Path) -> None:
    for file in ("samples.safetensors", "info.json"):
        (tmp_path / file).write_bytes((out / "unlearned_drawn" / file).read_bytes())
    info = json.loads((tmp_path / "info.json").read_text())
    (tmp_path / "info.json").write_text(json.dumps(info | {"seed": 1}))
    with pytest.raises(ConfigError, match="after: these samples and those of `before` have other labels or seeds"):
        stage_of(out, after=str(tmp_path)).execute(tmp_path / "none")
    (tmp_path / "info.json").write_text(json.dumps(info))
    samples = load_file(tmp_path / "samples.safetensors")
    save_file({"x": samples["x"].clone(), "label": samples["label"].flip(0).contiguous()}, tmp_path / "samples.safetensors")
    with pytest.raises(ConfigError, match="have other labels or seeds"):
        stage_of(out, after=str(tmp_path)).execute(tmp_path / "none")


def test_each_condition_is_on_its_own_side() -> None:
    release: Release = {
        "forget": "3", "weights": "",
        "checks": [{"what": "a", "measured": 0.03, "limit": 0.02, "met": False}, {"what": "b", "measured": 1.0, "limit": 2.0, "met": True}],
        "attacks": [],
    }  # fmt: skip
    assert unmet(release) == ["a is 0.03, the limit 0.02"]
    assert "| b | 1 | 2 | yes |" in statement("3", release) and "No attack was tried." in statement("3", release)


def test_the_gate_compares_the_worse_ends() -> None:
    def metric(value: float, better: Any) -> Metric:
        return Metric("m", value, value - 0.01, value + 0.01, better, "")

    def rows(forget: list[float], override: list[float], remain: float, distance: float) -> Measured:
        several = [metric(value, "lower") for value in forget], [metric(value, "higher") for value in override]
        return Measured(*several, metric(remain, "higher"), metric(distance, "lower"))

    gate = Gate(forget=0.02, override=0.9, remain_loss=0.0, distance_factor=1.0, relearning=5, inversion=0.5)
    stage = Unlearning(forget=3, judge="j", before="nowhere", after="nowhere", override=8, gate=gate)
    before = rows([1], [0], 0.95, 0.5)

    def met(*after: Any, relearning: float = 5, inversion: float = 0.5) -> list[bool]:
        told = [("steps until relearnt", 9.0, relearning, 20.0), ("success of inversion", 0.2, 0.1, inversion)]
        attacks = [{"what": what, "measured": value, "low": low, "high": high, "definition": ""} for what, value, low, high in told]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gentrain.recipes.unlearning.read_info", lambda place: {})
            patch.setattr(Unlearning, "_attacks", lambda self, weights: attacks)
            release = stage._release("3", {"before": before, "after": rows(*after)})
        return [check["met"] for check in release["checks"]]

    assert met([0.009], [0.911], 0.941, 0.509) == [True] * 6
    assert met([0.011], [0.911], 0.941, 0.509) == [False, True, True, True, True, True]
    assert met([0.009], [0.909], 0.941, 0.509) == [True, False, True, True, True, True]
    assert met([0.009], [0.911], 0.939, 0.509) == [True, True, False, True, True, True]
    assert met([0.009], [0.911], 0.941, 0.511) == [True, True, True, False, True, True]
    assert met([0.009], [0.911], 0.941, 0.509, relearning=4) == [True, True, True, True, False, True]
    assert met([0.009], [0.911], 0.941, 0.509, inversion=0.51) == [True, True, True, True, True, False]
    # of several classes the worst counts
    assert met([0.0, 0.011, 0.0], [0.99, 0.95, 0.909], 0.941, 0.509) == [False, False, True, True, True, True]


def test_several_classes_are_forgotten_at_once(out: Path, tmp_path: Path) -> None:
    stage_of(out, forget=[3, "5"], override=[8, 6]).execute(tmp_path)
    names = [metric["name"] for metric in json.loads((tmp_path / "metrics.json").read_text())["metrics"]]
    assert names[:6] == [
        "forget accuracy of 3, after", "override rate of 3, after", "forget accuracy of 5, after", "override rate of 5, after",
        "remain accuracy, after", "Frechet distance of the others, after",
    ]  # fmt: skip
    assert json.loads((tmp_path / "release.json").read_text())["forget"] == "3, 5"


def test_an_attack_on_other_weights_says_nothing(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"attacks: .*relearning attacked other weights than those that drew .*student_drawn"):
        stage_of(out, after=str(out / "student_drawn"), attacks=[str(out / "relearning")]).execute(tmp_path)


def test_samples_of_other_prompts_are_refused(out: Path, tmp_path: Path) -> None:
    for file in ("samples.safetensors", "info.json"):
        (tmp_path / file).write_bytes((out / "unlearned_drawn" / file).read_bytes())
    info = json.loads((tmp_path / "info.json").read_text())
    assert info["names"] == [str(digit) for digit in range(10)]
    (tmp_path / "info.json").write_text(json.dumps(info | {"names": ["cat", "dog"]}))
    with pytest.raises(ConfigError, match="after: these are samples of cat, dog; the judge reads 0, 1, 2"):
        stage_of(out, after=str(tmp_path)).execute(tmp_path / "none")
