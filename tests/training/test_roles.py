"""Which weights a role starts from, and what losses see of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gentrain.catalogue import plan_tables
from gentrain.config import ConfigError
from gentrain.models.denoiser import Denoiser
from gentrain.training.roles import Roles, build_network, load_network, load_weights
from gentrain.training.run import save_config
from gentrain.training.world import World
from tests.distributed.cases import Job, newest, run_of, state_of, train_all, values

ALONE = World(0, 1, torch.device("cpu"))


def _trained(settings: dict[str, Any], stop_at: int | None = None) -> Path:
    run = run_of(settings)
    save_config(run)
    train_all(ALONE, [Job(settings, stop_at)])
    return run.directory


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_role_starts_from_the_role_it_names_and_others_from_seeds_of_their_own(tmp_path: Path) -> None:
    roles = Roles(run_of(values(tmp_path)), ALONE)
    teacher = roles.frozen["teacher"].state_dict()
    assert _same(roles.engines["student"].weights(), teacher) and _same(roles.frozen["reference"].state_dict(), teacher)
    assert not torch.equal(roles.engines["critic"].weights()["input.weight"], teacher["input.weight"])
    assert _same(teacher, build_network(run_of(values(tmp_path)), "teacher").state_dict())
    other = Roles(run_of(values(tmp_path) | {"seed": 6}), ALONE)
    assert not torch.equal(other.frozen["teacher"].state_dict()["input.weight"], teacher["input.weight"])


def test_a_frozen_copy_of_a_role_that_learns_stays_its_first_weights_on_resume(tmp_path: Path) -> None:
    settings = values(tmp_path)
    _trained(settings, stop_at=2)
    run = run_of(settings)
    with run.storage.open(newest(tmp_path).name) as checkpoint:
        resumed = Roles(run, ALONE, checkpoint)
    fresh = Roles(run_of(settings | {"output": str(tmp_path / "fresh")}), ALONE)
    assert _same(resumed.frozen["reference"].state_dict(), fresh.frozen["reference"].state_dict())
    assert not _same(resumed.engines["student"].weights(), fresh.engines["student"].weights())


def test_weights_come_from_the_average_of_another_run(tmp_path: Path) -> None:
    source = _trained(values(tmp_path / "source", "flow_matching"))
    settings = values(tmp_path / "run") | {"roles": {"teacher": {"weights": str(source)}}}
    roles = Roles(run_of(settings), ALONE)
    average = {name.removeprefix("model.ema/"): v for name, v in state_of(source).items() if name.startswith("model.ema/")}
    for weights in (roles.frozen["teacher"].state_dict(), roles.engines["student"].weights(), load_weights(str(source))):
        assert _same(weights, average)
    denoiser, run = load_network(source)
    assert isinstance(denoiser, Denoiser) and _same(denoiser.network.state_dict(), average) and not denoiser.network.training  # type: ignore[attr-defined]
    assert run.method.registered_name == "flow_matching"


def test_weights_that_do_not_fit_or_are_not_there_are_named(tmp_path: Path) -> None:
    source = _trained(values(tmp_path / "source", "flow_matching"), stop_at=1)
    settings = values(tmp_path / "run") | {"model": {"name": "mlp", "width": 8}, "roles": {"teacher": {"weights": str(source)}}}
    with pytest.raises(ConfigError, match=r"roles\.teacher\.weights: the weights are of another network: 'hidden\.2\.bias' is \[11\]"):
        Roles(run_of(settings), ALONE)
    save_config(run_of(values(tmp_path / "empty")))
    with pytest.raises(ConfigError, match=r"roles\.teacher\.weights: .*has no checkpoint yet; train it first"):
        Roles(run_of(values(tmp_path / "run") | {"roles": {"teacher": {"weights": str(tmp_path / "empty")}}}), ALONE)


@pytest.mark.parametrize("changed, message", [
    ({"path": "trigflow"}, r"roles\.teacher\.weights: .*source was trained otherwise .* its path: \{name: rectified_flow, .*velocity"),
    ({"prediction": "v"}, r"roles\.teacher\.weights: .*source was trained otherwise than it is read here"),
    ({"model": {"name": "mlp", "width": 8, "time_scale": 1.0}}, r"model: .*was trained with time_scale 0\.01, and is read with 1\.0"),
])  # fmt: skip
def test_weights_that_would_be_read_otherwise_than_they_were_trained_are_refused(tmp_path: Path, changed: Any, message: str) -> None:
    model = {"model": {"name": "mlp", "width": 8, "time_scale": 0.01}}
    source = _trained(values(tmp_path / "source", "flow_matching") | model, stop_at=1)
    settings = values(tmp_path / "run") | model | {"roles": {"teacher": {"weights": str(source)}}}
    Roles(run_of(settings), ALONE)
    other = run_of(settings | changed)
    for check in (lambda: Roles(other, ALONE), lambda: plan_tables({"run": other}, None)):
        with pytest.raises(ConfigError, match=message):
            check()


def test_a_student_is_no_teacher(tmp_path: Path) -> None:
    flow = _trained(values(tmp_path / "flow", "flow_matching"), stop_at=1)

    def taught_by(name: str, teacher: Path) -> dict[str, Any]:
        return values(tmp_path / name, "consistency_distillation") | {"roles": {"teacher": {"weights": str(teacher)}}}

    student = _trained(taught_by("student", flow), stop_at=1)
    with pytest.raises(ConfigError, match=r"roles\.teacher\.weights: .*holds a student of consistency_distillation, which follows no flow"):
        Roles(run_of(taught_by("next", student)), ALONE)
    settings = values(tmp_path / "more", "consistency_training") | {"roles": {"model": {"weights": str(student)}}}
    Roles(run_of(settings), ALONE)  # which may well begin from one
    mlp = {"model": {"name": "mlp", "width": 8, "depth": 1}}
    flow_map = _trained(values(tmp_path / "map", "mean_flow") | mlp, stop_at=1)
    with pytest.raises(ConfigError, match=r"roles\.teacher\.weights: .* is given 'end', too, and this role's is not; name a run without"):
        Roles(run_of(taught_by("third", flow_map) | mlp), ALONE)


def test_a_network_that_does_not_fit_the_data_is_a_mistake_of_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"roles\.critic\.model: unet is for images"):
        Roles(run_of(values(tmp_path) | {"roles": {"critic": {"model": "unet"}}}), ALONE)


def test_losses_see_denoisers_bare_networks_and_no_role_that_is_not_there(tmp_path: Path) -> None:
    roles = Roles(run_of(values(tmp_path)), ALONE)
    with roles.stepping("student") as nets:
        assert isinstance(nets.student, Denoiser) and isinstance(nets.teacher, Denoiser) and nets.teacher.prediction == "velocity"
        assert not isinstance(nets.critic, Denoiser)
        assert roles.engines["student"].module.training and not roles.engines["critic"].module.training
        assert not any(p.requires_grad for p in roles.engines["critic"].module.parameters())
        assert nets.group.size == 1
        with pytest.raises(AttributeError, match="no role 'judge'; its roles: teacher, reference, critic, student"):
            _ = nets.judge
    assert all(p.requires_grad for p in roles.engines["critic"].module.parameters())
