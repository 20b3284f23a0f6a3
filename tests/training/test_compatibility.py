"""Parts of a configuration that would go together without a word, and teach nothing or something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gentrain.config import ConfigError
from gentrain.training.run import RunConfig
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
