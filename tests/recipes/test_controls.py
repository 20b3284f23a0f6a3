"""Samples of a generator that is given a control: of the class, and of held-out images; their condition error; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from gentrain import cli
from gentrain.config import ConfigError
from gentrain.data.base import Data
from gentrain.extractors.closed_form import DownSampling
from gentrain.methods.base import Clock
from gentrain.models.base import Codec
from gentrain.recipes.controls import condition_error, paired
from gentrain.recipes.evaluate import Evaluate, read_metrics
from gentrain.recipes.export import Export
from gentrain.recipes.generate import Generate
from gentrain.samplers.base import Sampler
from gentrain.samplers.euler import Euler
from gentrain.samplers.one_step import OneStep
from gentrain.training import callbacks
from gentrain.training.callbacks import Previews
from gentrain.training.controls import controls_of
from gentrain.training.given import refuse_other_law
from gentrain.training.loop import train
from gentrain.training.roles import Roles
from gentrain.training.run import RunConfig, open_run, save_config
from gentrain.training.world import World
from tests.distributed.cases import run_of

ALONE = World(0, 1, torch.device("cpu"))
UNLABELLED = {"name": "unlabelled", "data": "digits"}
UNET = {"name": "unet", "channels": [8, 16], "attention": [], "norm_groups": 4}
SHORT = {"samples": 32, "batch_size": 16, "log_every": 16, "preview_every": 16, "preview_count": 4}


def trained(directory: Path, **settings: Any) -> str:
    run = run_of({"model": UNET, "engine": "torch", "training": SHORT, "output": str(directory), **settings})
    save_config(run)
    train(run, ALONE, lambda: False)
    return str(directory)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge, a teacher without classes, and students of it with the class and with a smaller copy as a control; a ControlNet as well."""
    root = tmp_path_factory.mktemp("runs")
    judge = trained(root / "judge", method="classifier", data="digits", model="cnn", training={**SHORT, "preview_every": 0})
    teacher = trained(root / "teacher", method="flow_matching", data=UNLABELLED)
    below = {"teacher": {"weights": teacher}}
    of_judge = {"judge": {"weights": judge, "model": {"name": "cnn"}}}
    smaller = {"name": "down_sampling", "factor": 2}
    trained(root / "label", method={"name": "jdm", "control": {"name": "label"}}, data="digits", roles={**below, **of_judge})
    trained(root / "enlarge", method={"name": "jdm", "control": smaller}, data=UNLABELLED, roles=below)
    by_class = {"name": "flow_matching", "control": {"name": "label"}}
    trained(root / "label_many", method=by_class, data="digits", roles={"model": {"weights": teacher}})
    trained(root / "many", method={"name": "flow_matching", "control": smaller}, data=UNLABELLED, roles={"model": {"weights": teacher}})
    return root


def test_a_student_of_a_teacher_without_classes_is_asked_for_one(root: Path, tmp_path: Path) -> None:
    Generate(run=str(root / "label"), count=20).execute(tmp_path)
    found = load_file(tmp_path / "samples.safetensors")
    assert torch.equal(found["label"], torch.arange(20) % 10) and torch.equal(found["control"], found["label"])
    Evaluate(samples={"label": str(tmp_path)}, judge=None, data=open_run(root / "label").data).execute(tmp_path / "scores")
    (error,) = [row for row in read_metrics(tmp_path / "scores") if row["name"] == "condition error, label"]
    assert 0 <= error["value"] <= 1 and "another class" in error["definition"]
    assert list((root / "label" / "samples").glob("*.png"))  # previews are drawn with controls, too


@pytest.mark.parametrize("run", ["enlarge", "many"])
def test_controls_are_those_of_held_out_images_in_turn(root: Path, run: str, tmp_path: Path) -> None:
    Generate(run=str(root / run), count=12, columns=4).execute(tmp_path)
    found, held_out = load_file(tmp_path / "samples.safetensors"), open_run(root / run).data.split("held_out")
    x = torch.stack([held_out[index]["x"] for index in range(12)])
    torch.testing.assert_close(found["control"], DownSampling(factor=2).read(x, {}))
    assert torch.equal(found["label"], torch.full((12,), -1))
    Evaluate(samples={"set": str(tmp_path)}, data=open_run(root / run).data).execute(tmp_path / "scores")
    (error,) = [row for row in read_metrics(tmp_path / "scores") if row["name"] == "condition error, set"]
    expected = (DownSampling(factor=2).read(found["x"], {}) - found["control"]).abs().mean().item()
    assert error["value"] == pytest.approx(expected, rel=0.05) and error["low"] < expected < error["high"]


def test_there_may_be_more_samples_than_held_out_images(root: Path) -> None:
    run = open_run(root / "enlarge")
    count = len(run.data.split("held_out"))
    _, controls = controls_of(run, torch.full((count + 2,), -1))
    assert controls is not None and torch.equal(controls[count:], controls[:2])


def test_a_share_of_the_samples_takes_its_own_controls(root: Path) -> None:
    run = open_run(root / "enlarge")
    _, whole = controls_of(run, torch.full((6,), -1))
    _, share = controls_of(run, torch.full((3,), -1), first=3)
    assert whole is not None and share is not None and torch.equal(share, whole[3:]) and not torch.equal(share, whole[:3])


def test_previews_are_the_same_on_any_number_of_ranks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = open_run(root / "enlarge"), []

    def drawn(self: Sampler, denoiser: Any, shape: Any, noise: Any, condition: Any) -> torch.Tensor:
        asked.append(condition["control"])
        return torch.zeros(shape)

    monkeypatch.setattr(OneStep, "sample", drawn)
    monkeypatch.setattr(callbacks, "save_grid", lambda *_, **__: None)
    roles = Roles(run, ALONE)
    for world in (ALONE, World(0, 2, ALONE.device), World(1, 2, ALONE.device)):
        roles.group = SimpleNamespace(gather=lambda images: images)  # type: ignore[assignment]
        trainer: Any = SimpleNamespace(run=run, roles=roles, world=world, clock=Clock(16, 16, 32))
        Previews(trainer).after_step(trainer)
    assert torch.equal(torch.cat(asked[1:]), asked[0]) and not torch.equal(asked[1], asked[2])


def test_classes_that_the_held_out_items_bring_along_are_not_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave it out") as caught:
        Generate(run=str(root / "enlarge"), count=4, labels=[0]).execute(tmp_path)
    assert caught.value.key == "labels"


ONE_STEP = {"name": "distribution_matching"}


@pytest.mark.parametrize(
    ("method", "role", "source"),
    [
        ("noise_consistency", "teacher", "flow_matching"),
        ("noise_consistency", "teacher", {**ONE_STEP, "sigma": 2.0}),
        ("jdm", "student", {**ONE_STEP, "sigma": 2.0}),
        ("jdm", "student", {**ONE_STEP, "steps": 2}),
    ],
)
def test_weights_that_are_not_drawn_from_in_one_such_step_are_refused(tmp_path: Path, method: str, role: str, source: Any) -> None:
    def run(name: str, method: Any, **roles: str) -> RunConfig:
        given = {role: {"weights": str(tmp_path / place)} for role, place in roles.items()}
        settings = {"model": UNET, "engine": "torch", "data": UNLABELLED, "training": SHORT, "output": str(tmp_path / name)}
        saved = run_of({**settings, "method": method, "roles": given})
        save_config(saved)
        return saved

    run("flow", "flow_matching")
    run("one_step", ONE_STEP, teacher="flow")
    run("other", source, **({} if source == "flow_matching" else {"teacher": "flow"}))
    steered = {"name": method, "control": {"name": "down_sampling", "factor": 2}}
    refuse_other_law(run("run", steered, **{"teacher": "flow", role: "one_step"}), role)
    with pytest.raises(ConfigError, match="name the run of a one-step student") as caught:
        refuse_other_law(run("run", steered, **{"teacher": "flow", role: "other"}), role)
    assert caught.value.key == f"roles.{role}.weights"


def test_another_control_gives_another_sample_of_the_same_noise(root: Path) -> None:
    from gentrain.cluster.generation import generate

    run = open_run(root / "enlarge")
    labels, controls = controls_of(run, torch.full((3,), -1))
    assert controls is not None
    one = generate(root / "enlarge", run.sampler, labels, controls=controls)
    other = generate(root / "enlarge", run.sampler, labels, controls=controls.flip(0))
    assert (one - other).abs().amax((1, 2, 3))[0] > 0 and torch.equal(one[1], other[1])


def test_a_judge_reads_what_was_drawn_of_no_class_without_an_accuracy(root: Path, tmp_path: Path) -> None:
    Generate(run=str(root / "enlarge"), count=200).execute(tmp_path)
    Evaluate(samples={"enlarge": str(tmp_path)}, judge=str(root / "judge")).execute(tmp_path / "scores")
    names = [row["name"] for row in read_metrics(tmp_path / "scores")]
    assert "class accuracy, enlarge" not in names and {"Frechet distance, enlarge", "condition error, enlarge"} <= set(names)


def test_the_class_that_a_flow_was_asked_for_is_read_by_the_judge_of_the_stage(root: Path, tmp_path: Path) -> None:
    """The run itself has none."""
    Generate(run=str(root / "label_many"), count=200).execute(tmp_path)
    Evaluate(samples={"many": str(tmp_path)}, judge=str(root / "judge")).execute(tmp_path / "judged")
    values = {row["name"]: row["value"] for row in read_metrics(tmp_path / "judged")}
    assert values["condition error, many"] == pytest.approx(1 - values["class accuracy, many"], abs=0.02)  # means of resamples
    Evaluate(samples={"many": str(tmp_path)}, data=open_run(root / "label_many").data).execute(tmp_path / "alone")
    names = [row["name"] for row in read_metrics(tmp_path / "alone")]
    assert names and "condition error, many" not in names


def test_a_class_must_be_named_where_it_is_the_control(root: Path) -> None:
    with pytest.raises(ConfigError, match="asked for a class"):
        controls_of(open_run(root / "label"), torch.tensor([0, -1]))


def test_no_pipeline_of_diffusers_is_written_that_would_lack_the_control(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="draw samples with gentrain"):
        Export(run=str(root / "label")).write(tmp_path / "out")
    with pytest.raises(ConfigError, match="networks of its pipelines"):
        Export(run=str(root / "label"), form="control_net").write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_draws_and_measures(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["sample", str(root / "enlarge"), "count=10"], ["evaluate", str(root / "enlarge")]):
        assert cli._guarded(lambda arguments=arguments, **options: cli.app(args=arguments, **options)) == 0
    assert "condition error, generated" in " ".join(capsys.readouterr().out.split())
    assert "condition error" in json.dumps(read_metrics(root / "enlarge" / "evaluation"))


def test_samples_that_were_not_decoded_are_before_they_are_compared(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents that hold four pixels in four channels: the same error as of the images."""

    class Packed(Codec):
        def __init__(self, data: Data):
            super().__init__(data)
            self.shape = (4, 4, 4)

        def decode(self, x: torch.Tensor) -> torch.Tensor:
            return pixel_shuffle(x, 2)

    Generate(run=str(root / "enlarge"), count=12).execute(tmp_path)
    found = load_file(tmp_path / "samples.safetensors")
    images = condition_error("set", str(tmp_path))
    save_file({**found, "x": pixel_unshuffle(found["x"], 2)}, tmp_path / "samples.safetensors")
    monkeypatch.setattr(RunConfig, "codec", lambda run: Packed(run.data))
    assert condition_error("set", str(tmp_path)) == images


def test_guidance_by_the_class_that_is_the_control_is_refused(root: Path) -> None:
    for run, message in (("label_many", "knows none to guide by"), ("many", "")):
        if message:
            with pytest.raises(ConfigError, match=message) as caught:
                open_run(root / run).drawn_with(Euler(guidance=2.0))
            assert caught.value.key == "sampler"
        open_run(root / run).drawn_with(Euler(guidance=1.0 if message else 2.0))


def test_rows_of_controls_stand_above_rows_of_samples() -> None:
    above, below = torch.arange(5.0).reshape(5, 1, 1, 1), torch.arange(10.0, 15.0).reshape(5, 1, 1, 1)
    assert paired(above, below, 2).flatten().tolist() == [0, 1, 10, 11, 2, 3, 12, 13]
    assert paired(above, below, 8).flatten().tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
