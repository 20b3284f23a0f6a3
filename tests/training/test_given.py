"""Runs whose weights a role is not to begin with, told before any are read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from gentrain.config import ConfigError
from gentrain.training.given import load_into, refuse_other_law, warn_of_untrained_null
from gentrain.training.roles import build_network
from gentrain.training.run import RunConfig, save_config
from tests.distributed.cases import run_of

MATCHING, CONSISTENCY = {"name": "distribution_matching"}, {"name": "consistency_distillation"}
STEERED = {"name": "jdm", "control": "signs"}
FORGETTING = {"name": "sfd", "forget": 0}
METHODS = {
    "flow": {"name": "flow_matching"},
    "unguided": {"name": "flow_matching", "label_dropout": 0},
    "one_step": MATCHING,
    "other_sigma": MATCHING | {"sigma": 2.0},
    "few_steps": MATCHING | {"steps": 2},
    "consistent": CONSISTENCY,
    "latent": {"name": "latent_consistency", "guidance": [1, 1]},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations of runs, as they stand beside weights."""
    root = tmp_path_factory.mktemp("runs")
    for name, method in METHODS.items():
        teacher = {} if method["name"] == "flow_matching" else {"teacher": {"weights": str(root / "flow")}}
        save_config(made(root, name, method, teacher))
    return root


def made(root: Path, name: str, method: dict[str, Any], roles: dict[str, Any]) -> RunConfig:
    training = {"samples": 8, "batch_size": 4}
    settings = {"model": "mlp", "engine": "torch", "data": "rings", "training": training, "output": str(root / name)}
    return run_of(settings | {"method": method, "roles": roles})


def using(runs: Path, method: dict[str, Any], **sources: str) -> RunConfig:
    roles = {role: {"weights": str(runs / source)} for role, source in ({"teacher": "flow"} | sources).items()}
    return made(runs, "new", method, roles)


NOISY = STEERED | {"condition_at": "noisy"}
NO_FLOW, ONE_STEP, NO_FUNCTION = (
    "which follows no flow; name its teacher's run",
    "name the run of a one-step student",
    "no consistency function",
)
CASES = [
    (method, "teacher", source, NO_FLOW) for method in (MATCHING, STEERED, FORGETTING) for source in ("one_step", "few_steps", "consistent")
]
CASES += [
    (method, role, source, ONE_STEP)
    for method, role in ((FORGETTING, "student"), (FORGETTING, "fake_score"), (STEERED, "fake_score"), (STEERED, "student"))
    for source in ("other_sigma", "few_steps")
]
CASES += [(STEERED, "student", "flow", ONE_STEP)]
CASES += [(NOISY, "consistency", source, NO_FUNCTION) for source in ("flow", "one_step", "latent")]


@pytest.mark.parametrize(("method", "role", "source", "said"), CASES, ids=lambda value: value if isinstance(value, str) else value["name"])
def test_weights_of_another_kind_are_refused(runs: Path, method: dict[str, Any], role: str, source: str, said: str) -> None:
    run = using(runs, method, **{role: source})
    with pytest.raises(ConfigError, match=said) as caught:
        refuse_other_law(run, role)
    assert caught.value.key == f"roles.{role}.weights"


@pytest.mark.parametrize(
    ("method", "role", "source"),
    [
        (MATCHING, "teacher", "flow"),
        (STEERED, "teacher", "flow"),
        (FORGETTING, "teacher", "flow"),
        (FORGETTING, "student", "one_step"),
        (FORGETTING, "fake_score", "one_step"),
        (FORGETTING | {"sigma": 2.0}, "student", "other_sigma"),
        (FORGETTING, "student", "flow"),  # as the teacher, or before it
        (FORGETTING, "fake_score", "flow"),
        (STEERED, "fake_score", "one_step"),
        (STEERED, "fake_score", "flow"),
        (NOISY, "consistency", "consistent"),
        ({"name": "noise_consistency", "control": "signs"}, "teacher", "one_step"),
    ],
)
def test_weights_of_the_right_kind_are_taken(runs: Path, method: dict[str, Any], role: str, source: str) -> None:
    refuse_other_law(using(runs, method, **{role: source}), role)


@pytest.mark.parametrize("method", [MATCHING, STEERED, FORGETTING, CONSISTENCY], ids=lambda method: method["name"])
def test_a_teacher_that_never_met_the_null_class_is_told(runs: Path, method: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_untrained_null(using(runs, method, teacher="unguided"))
        warn_of_untrained_null(using(runs, method | {"guidance": 2}, teacher="flow"))
        assert not caplog.records
        warn_of_untrained_null(using(runs, method | {"guidance": 2}, teacher="unguided"))
    assert "method.guidance asks role 'teacher' for the null class, which " in caplog.text and "has never met" in caplog.text


# --- weights of another network -------------------------------------------------------------------------------------------------


def states(name: str, **changed: Any) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The role's network, and its weights."""
    settings = {"method": "flow_matching", "data": "rings", "model": "mlp", "training": {"samples": 8}, "output": "unused"}
    network = build_network(run_of(settings | changed), name)
    return network, network.state_dict()


LABELLED = states("model")
UNLABELLED = states("model", data={"name": "unlabelled", "data": "rings"})
OTHERWISE = states("model", data={"name": "rings", "rings": 5})
STEERED_FLOW = states("model", method={"name": "flow_matching", "control": "signs"}, roles={"model": {"weights": "unused"}})


@pytest.mark.parametrize(
    ("role", "weights", "said"),
    [
        (LABELLED, UNLABELLED, "knows no classes, and this role's knows 3; wrap the data in the data set `unlabelled`"),
        (UNLABELLED, LABELLED, "knows 3 classes, and this role's knows none; name a run on the data set `unlabelled`"),
        (LABELLED, OTHERWISE, "knows 5 classes, and this role's knows 3; take the data of that run, or name one on these"),
        (LABELLED, STEERED_FLOW, "has the branch of a control, which this role has not; name a run without one"),
        (LABELLED, states("model", model={"name": "mlp", "width": 8}), "give the role the `model:` of the run they come from"),
    ],
)
def test_what_another_network_has_otherwise_is_told(role: Any, weights: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_into(role[0], weights[1], "roles.teacher.weights")
    assert caught.value.key == "roles.teacher.weights"
    load_into(role[0], role[1], "roles.teacher.weights")


def test_of_two_controls_the_other_is_told() -> None:
    weights = {name: value[:1] if name.startswith("control.") else value for name, value in STEERED_FLOW[1].items()}
    with pytest.raises(ConfigError, match="has the branch of another control; name a run without one"):
        load_into(STEERED_FLOW[0], weights, "roles.student.weights")
    load_into(STEERED_FLOW[0], LABELLED[1], "roles.student.weights")  # a branch begins anew
