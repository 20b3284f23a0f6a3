"""Parts of a configuration that would go together without a word, and teach nothing or something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gentrain.config import ConfigError
from gentrain.training.roles import Roles, build_network, count_parameters
from gentrain.training.run import RunConfig
from gentrain.training.world import World
from tests.distributed.cases import run_of
from tests.methods.captioned import CaptionedPatches
from tests.models.pipelines import stable_diffusion

PROMPTED = CaptionedPatches.registered_name
CONCEPTS = {"name": "concepts", "prompts": PROMPTED, "concepts": {"red": {"words": ["red"], "replace": "blue"}}}
UNET = {"name": "unet", "channels": [8], "attention": []}
LABELS = {"name": "labels", "size": [3, 8, 8], "classes": ["a", "b"]}
BLURRED = {"name": "jdm", "control": {"name": "down_sampling", "factor": 2}}
MATCHING = {"name": "distribution_matching"}


def run(method: Any, data: Any, role: str | None = "teacher", **more: Any) -> RunConfig:
    """`role`: whose weights are given."""
    roles = {} if role is None else {role: {"weights": "runs/teacher"}}
    settings = {"model": UNET, "engine": "torch", "training": {"samples": 8, "batch_size": 4}, "method": method, "data": data}
    return run_of({**settings, "roles": roles, **more})


def refused(key: str, said: str, *arguments: Any, **more: Any) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        run(*arguments, **more)
    assert caught.value.key == key


# --- prompts that no network reads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [UNET, "dit"])
@pytest.mark.parametrize(("method", "role"), [("sfd", "teacher"), ("esd", "original")])
def test_a_network_without_prompts_forgets_no_concept(method: str, role: str, model: Any) -> None:
    said = "reads no prompts, so that nothing would be forgotten; take the network of a text-to-image pipeline"
    refused("data", said, method, CONCEPTS, role, model=model)


@pytest.mark.parametrize(
    ("method", "role", "key", "none"),
    [
        (MATCHING | {"guidance": 2}, "teacher", "guidance", 1),
        (BLURRED | {"guidance": 0}, "teacher", "guidance", 1),
        ({"name": "latent_consistency", "guidance": [1, 2]}, "teacher", "guidance", 1),
        ({"name": "mean_flow", "mixing": 0.5}, None, "mixing", 0),
    ],
)
def test_captions_that_no_network_reads_guide_nobody(method: dict[str, Any], role: str | None, key: str, none: int) -> None:
    said = f"unet reads no prompts, so that the captions guide nothing; set it to {none}"
    refused(f"method.{key}", said, method, PROMPTED, role)
    plain: Any = {"guidance": [1, 1] if method["name"] == "latent_consistency" else 1, "mixing": 0}[key]
    run({**method, key: plain}, PROMPTED, role)


def test_a_pipeline_reads_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red rose\na tree\n")
    prompts = {"name": "prompts", "path": str(tmp_path / "prompts.txt"), "size": 16}
    model = {"name": "pretrained", "directory": str(stable_diffusion(tmp_path / "pipeline"))}
    run("sfd", CONCEPTS | {"prompts": prompts}, None, model=model)
    run(MATCHING | {"guidance": 2}, prompts, None, model=model)


# --- data that hold none --------------------------------------------------------------------------------------------------------


LEARNT_FROM: list[tuple[Any, str | None]] = [
    ("flow_matching", None),
    ("diffusion", None),
    ("consistency_distillation", "teacher"),
    (MATCHING | {"critic_weight": 0.1}, "teacher"),
    (MATCHING | {"generator_loss": "js"}, "teacher"),
    (MATCHING | {"generator_loss": "ladd", "critic_weight": 1}, "teacher"),
    (MATCHING | {"prompt_critic": {}}, "teacher"),
    (BLURRED, "teacher"),
    ({"name": "npo", "forget": 0}, "original"),
]
LEARNT_WITHOUT: list[tuple[Any, str]] = [
    (MATCHING, "teacher"),
    (MATCHING | {"generator_loss": "rkl", "guidance": 2}, "teacher"),
    ({"name": "sfd", "forget": 0}, "teacher"),
    ({"name": "esd", "forget": 0}, "original"),
    (BLURRED | {"name": "noise_consistency"}, "teacher"),
]


@pytest.mark.parametrize(("method", "role"), LEARNT_FROM, ids=str)
def test_blank_data_are_not_learnt_from(method: Any, role: str | None) -> None:
    said = "learns from the data themselves here, and labels holds none: each x is 0; name a data set that does"
    refused("data", said, method, LABELS, role)


def test_nor_are_blanks_among_other_data(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    prompts = {"name": "prompts", "path": str(tmp_path / "prompts.txt"), "size": 8}
    for data in (prompts, {"name": "unlabelled", "data": LABELS}, {"name": "combined", "parts": [{"data": LABELS}, {"data": LABELS}]}):
        refused("data", f"{data['name']} holds none: each x is 0", "flow_matching", data, None)
    run("flow_matching", LABELS | {"name": "drawn", "directory": "out/drawn"}, None)  # which are images, with labels


@pytest.mark.parametrize(("method", "role"), LEARNT_WITHOUT, ids=str)
def test_methods_without_data_go_on_with_blanks(method: Any, role: str) -> None:
    run(method, LABELS, role)


def test_the_class_as_a_control_needs_no_data() -> None:
    roles = {"teacher": {"weights": "runs/teacher"}, "judge": {"weights": "runs/judge", "model": "cnn"}}
    run({"name": "jdm", "control": "label"}, LABELS, roles=roles)


# --- where one call may lead ------------------------------------------------------------------------------------------------------


def test_sfd_keeps_away_from_walls() -> None:
    method, data = {"name": "sfd", "forget": 0}, {"name": "labels", "size": [2], "classes": ["a", "b"]}
    refused("path", "not a space with walls; take free or dual", method, data, model="mlp", path="reflected_heat")
    run(method, data, model="mlp")


@pytest.mark.parametrize("key", ["sigma", "sigma_min", "sigma_max"])
def test_a_level_that_the_path_never_has_is_one_of_its_key(key: str) -> None:
    method, path = {"name": "sfd", "forget": 0}, {"name": "variance_exploding"}
    value = 1e-4 if key == "sigma_min" else 100
    refused(f"method.{key}", rf"never has sigma / alpha = .* set {key} to that", method | {key: value}, LABELS, path=path)
    run(method | {key: 1.0 if key == "sigma_min" else 70}, LABELS, path=path)


# --- settings without effect ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value"), [("adapter", {"rank": 2}), ("trainable", "x"), ("optimizer", "adamw"), ("schedule", "constant")])
def test_a_frozen_role_learns_by_nothing(key: str, value: Any) -> None:
    roles = {"teacher": {"weights": "runs/teacher", key: value}, "consistency": {"weights": "runs/consistency"}}
    noisy = BLURRED | {"condition_at": "noisy"}
    refused(f"roles.teacher.{key}", "this role does not learn; leave it out", noisy, "digits", roles=roles)
    roles = {"teacher": {"weights": "runs/teacher"}, "consistency": {"weights": "runs/consistency", key: value}}
    refused(f"roles.consistency.{key}", "this role does not learn; leave it out", noisy, "digits", roles=roles)
    roles = {"teacher": {"weights": "runs/teacher", "placement": "sharded"}, "fake_score": {key: value}}
    run(MATCHING, "digits", roles=roles)


def test_a_control_that_counts_for_nothing_is_refused() -> None:
    said = "learn nothing of the control; set it above 0"
    refused("method.condition_weight", said, BLURRED | {"condition_weight": 0}, "digits")
    run(BLURRED | {"condition_weight": 0.01}, "digits")
    refused(
        "method.control.factor", "expected a whole number >= 2", BLURRED | {"control": {"name": "down_sampling", "factor": 1}}, "digits"
    )


def test_a_judge_without_a_network_of_its_own_is_told_where_it_goes() -> None:
    judged, judge = {"name": "jdm", "control": "label"}, {"weights": "runs/judge"}
    roles = {"teacher": {"weights": "runs/teacher"}, "judge": judge}
    with pytest.raises(ConfigError, match=r"a network that classifies is needed, and unet does not; there are: cnn$") as caught:
        build_network(run(judged, "digits", roles=roles), "judge")
    assert caught.value.key == "roles.judge.model"
    build_network(run(judged, "digits", roles=roles | {"judge": judge | {"model": "cnn"}}), "judge")


@pytest.mark.parametrize("control", ["depth", "segmentation"])
def test_the_model_of_a_control_is_looked_for_before_training(tmp_path: Path, control: str) -> None:
    steered = {"name": "jdm", "control": {"name": control, "directory": str(tmp_path)}}
    refused("method.control.directory", "config.json does not exist; name a directory", steered, "digits")
    (tmp_path / "config.json").write_text("{}")
    if control == "segmentation":
        refused("method.control.directory", "names no classes", steered, "digits")
    (tmp_path / "config.json").write_text('{"id2label": {"0": "sky"}}')
    run(steered, "digits")


def test_of_an_adapter_that_reads_no_step_the_role_is_told() -> None:
    told, part = MATCHING | {"steps": 2, "fake_score_reads_step": True}, {"rank": 2, "targets": ["linear"]}
    few = {"rank": 2, "targets": ["output"]}
    data, teacher = {"name": "labels", "size": [2], "classes": ["a", "b"]}, {"teacher": {"weights": "runs/teacher"}}
    with pytest.raises(ConfigError, match="give the role an adapter of its own that names step, too") as caught:
        count_parameters(run(told, data, model="mlp", adapter=few, roles=teacher), "fake_score")
    assert caught.value.key == "roles.fake_score.adapter.targets"
    mended = run(told, data, model="mlp", adapter=few, roles=teacher | {"fake_score": {"adapter": few | {"targets": ["output", "step"]}}})
    for settings in (mended, run(told, data, model="mlp", adapter=part, roles=teacher)):
        assert count_parameters(settings, "fake_score")[1] and count_parameters(settings, "student")[1]


def test_mistaken_weights_are_those_of_the_run(tmp_path: Path) -> None:
    mistaken = run("flow_matching", "digits", None, roles={"model": {"weights": str(tmp_path)}}, output=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="is not a run's directory") as caught:
        Roles(mistaken, World(0, 1, torch.device("cpu")))
    assert (caught.value.source, caught.value.key) == (str(tmp_path / "out"), "roles.model.weights")
