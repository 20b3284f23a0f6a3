"""What a run's configuration refuses, and what a role takes from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gentrain.config import ConfigError, Document, register
from gentrain.training.optimizers import Optimizer
from gentrain.training.run import RunConfig, open_run, parse_run, save_config
from tests.distributed.cases import run_of, values


@register("test_whole_matrices")
@dataclass
class _WholeMatrices(Optimizer):
    needs = "matrix"
    lr: float = 0.1

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, self.lr)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimiser_that_sharding_would_change_is_refused(stage: int) -> None:
    settings = values(Path("unused"), "relay", {"name": "deepspeed", "zero_stage": stage}) | {"optimizer": "test_whole_matrices"}
    with pytest.raises(ConfigError, match=r"test_whole_matrices needs matrix access .* role 'critic'.*set engine.zero_stage to 0"):
        run_of(settings)


@pytest.mark.parametrize("engine", ["torch", {"name": "deepspeed", "zero_stage": 0}])
def test_an_optimiser_that_needs_whole_parameters_may_run_where_they_are_whole(engine: object) -> None:
    run_of(values(Path("unused"), "relay", engine) | {"optimizer": "test_whole_matrices"})  # type: ignore[arg-type]


def test_a_role_has_an_optimiser_that_fits_its_own_engine() -> None:
    settings = values(Path("unused"), "relay", {"name": "deepspeed", "zero_stage": 1})
    with pytest.raises(ConfigError, match="role 'student'"):
        run_of(settings | {"roles": {"student": {"optimizer": "test_whole_matrices"}}})
    run_of(settings | {"roles": {"student": {"optimizer": "test_whole_matrices", "engine": "torch"}}})


def test_an_unknown_role_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"roles\.judge: relay has no role 'judge'; its roles: teacher, critic, student, reference"):
        run_of(values(Path("unused")) | {"roles": {"judge": {}}})


@pytest.mark.parametrize("batch_size, remedy", [(10, 8), (3, 4)])
def test_a_batch_that_workers_cannot_share_is_refused_with_one_that_they_can(batch_size: int, remedy: int) -> None:
    with pytest.raises(ConfigError, match=rf"training\.batch_size: .*2 workers x 2 micro-batches; {remedy} can"):
        run_of(values(Path("unused"), batch_size=batch_size) | {"cluster": {"place": "ray", "workers": 2}})


def test_roles_override_the_run() -> None:
    run = run_of(values(Path("unused")) | {"roles": {"critic": {"optimizer": {"name": "sgd", "lr": 0.5}, "schedule": "constant"}}})
    assert (run.optimizer_of("critic").lr, run.optimizer_of("student").lr) == (0.5, 0.01)
    assert run.schedule_of("critic").registered_name == "constant" and run.schedule_of("student") is run.schedule
    assert run.engine_of("critic") is run.engine and run.model_of("critic") is run.model


def test_the_saved_configuration_alone_makes_the_same_run_wherever_it_is_moved(tmp_path: Path) -> None:
    run = run_of(values(tmp_path / "here", "flow_matching", {"name": "deepspeed", "settings": {"wall_clock_breakdown": True}}))
    save_config(run)
    assert open_run(tmp_path / "here") == run
    (tmp_path / "here").rename(tmp_path / "there")
    assert open_run(tmp_path / "there").directory == tmp_path / "there"
    with pytest.raises(ConfigError, match="not a run's directory"):
        open_run(tmp_path)


@pytest.mark.parametrize("dropout, guidance, warned", [(0.0, 3.0, True), (0.0, 1.0, False), (0.1, 3.0, False)])
def test_guidance_without_a_null_class_is_told(caplog: pytest.LogCaptureFixture, dropout: float, guidance: float, warned: bool) -> None:
    method = {"name": "flow_matching", "label_dropout": dropout}
    settings = {"method": method, "data": "rings", "model": "mlp", "training": {"samples": 1}}
    parse_run(Document({**settings, "sampler": {"name": "euler", "guidance": guidance}}, "test"))
    assert any("the null class" in message for message in caplog.messages) == warned


@pytest.mark.parametrize("sampler", ["consistency", "lcm", "one_step", "few_step", "flow_map", "heun"])
def test_samplers_that_take_the_mean_of_a_flow_for_data_are_told(sampler: str, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"data": "rings", "model": "mlp", "training": {"samples": 1}, "sampler": sampler}
    parse_run(Document({**settings, "method": "flow_matching"}, "test"))
    assert (f"{sampler} takes the x0 prediction for data" in caplog.text) == (sampler not in ("flow_map", "heun"))
    caplog.clear()
    if sampler in ("consistency", "lcm"):
        parse_run(Document({**settings, "method": "consistency_training"}, "test"))
        assert caplog.text == ""


def test_guidance_without_a_condition_is_told(caplog: pytest.LogCaptureFixture) -> None:
    settings = {"method": "flow_matching", "model": "mlp", "training": {"samples": 1}, "sampler": {"name": "euler", "guidance": 3}}
    parse_run(Document({**settings, "data": "rings"}, "test"))
    assert caplog.text == ""
    parse_run(Document({**settings, "data": {"name": "unlabelled", "data": "rings"}}, "test"))
    assert "guidance 3 changes nothing, for the data have neither classes nor captions" in caplog.text


WALLED = {"name": "rectified_flow", "space": {"name": "inside", "domain": {"name": "box", "low": -1.0, "high": 1.0}}}
HEAT = {"name": "reflected_heat"}
MIRROR = {"name": "rectified_flow", "space": {"name": "dual", "domain": {"name": "box", "low": -1.0, "high": 1.0}}}


def confined(method: str, path: dict[str, object], sampler: object = None) -> RunConfig:
    values = {"method": method, "path": path, "data": "checkerboard", "model": "mlp", "training": {"samples": 64, "batch_size": 64}}
    return parse_run(Document(values | ({} if sampler is None else {"sampler": sampler}), "x.yaml"))


@pytest.mark.parametrize(
    "method, path, name", [("reflected_flow", WALLED, "reflected_ode"), ("reflected_diffusion", HEAT, "reflected_sde")]
)
def test_where_no_sampler_is_named_one_that_keeps_inside_is_taken(
    method: str, path: dict[str, object], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = confined(method, path)
    assert run.sampler is not None and run.sampler.registered_name == name and caplog.text == ""
    confined(method, path, "euler")
    assert "euler does not know the walls" in caplog.text


@pytest.mark.parametrize(
    "path, sampler, message",
    [
        (MIRROR, "reflected_ode", "the space dual has no walls to reflect at; take the sampler euler or heun"),
        (MIRROR, "reflected_sde", "reflected_sde walks back reflected_heat only"),
        (MIRROR, {"name": "ddim", "eta": 0.5}, "ddim adds normal noise, which the prior of the space dual is not"),
        (MIRROR, "sde_dpm_solver", "sde_dpm_solver adds normal noise"),
        (MIRROR, "restart", "restart adds normal noise"),
        (MIRROR, "ddim", None),
        ({**MIRROR, "space": {**MIRROR["space"], "nu": float("inf")}}, {"name": "ddim", "eta": 1.0}, None),  # type: ignore[dict-item]
    ],
)
def test_samplers_of_other_spaces_are_refused_before_training(path: dict[str, object], sampler: object, message: str | None) -> None:
    if message is None:
        confined("mirror_flow", path, sampler)
    else:
        with pytest.raises(ConfigError, match=f"x.yaml: sampler: {message}"):
            confined("mirror_flow", path, sampler)


TIMESTEPS = {"name": "variance_preserving"}


@pytest.mark.parametrize(
    "path, sampler, message",
    [
        *((TIMESTEPS, {"name": name, "steps": 1001}, "1001 steps on a path of 1000 timesteps; take at most that many")
          for name in ("euler", "heun", "ddim", "dpm_solver", "sde_dpm_solver", "restart")),
        *((TIMESTEPS, {"name": name, "steps": 1000}, "1000 steps between 1000 timesteps; take at most 999")
          for name in ("consistency", "flow_map")),
        *(("rectified_flow", {"name": name, "steps": 10**9}, "1000000000 steps are more than any network tells apart")
          for name in ("euler", "ddim", "consistency", "flow_map")),
        (TIMESTEPS, {"name": "confined", "domain": "box", "steps": 1001}, "1001 steps on a path of 1000 timesteps"),
        (TIMESTEPS, {"name": "guided", "sampler": "heun", "steps": 1001}, "1001 steps on a path of 1000 timesteps"),
        ("rectified_flow", {"name": "heun", "spacing": "karras"}, "rectified_flow ends in pure noise, where Karras spacing does not exist"),
        ("rectified_flow", {"name": "euler", "spacing": "log_snr"}, "rectified_flow has an infinite log-SNR at an end"),
        ("rectified_flow", {"name": "restart", "steps": 3}, "no step of the walk lies between"),
        (MIRROR, {"name": "guided", "sampler": {"name": "ddim", "eta": 0.5}}, "ddim adds normal noise, which the prior of the space dual"),
    ],
)  # fmt: skip
def test_steps_that_do_not_exist_are_refused_before_training(path: Any, sampler: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"x.yaml: sampler: {message}"):
        confined("mirror_flow" if path is MIRROR else "flow_matching", path, sampler)


def test_steps_of_a_teacher_that_do_not_exist_are_refused_before_training() -> None:
    settings = {"method": {"name": "consistency_distillation", "intervals": 1000}, "path": TIMESTEPS, "prediction": "v"}
    rest = {"data": "rings", "model": "mlp", "roles": {"teacher": {"weights": "o"}}, "training": {"samples": 64}}
    with pytest.raises(ConfigError, match=r"method\.intervals: 1000 steps between 1000 timesteps; take at most 999"):
        parse_run(Document(settings | rest, "x.yaml"))


@pytest.mark.parametrize(
    "path, sampler, message",
    [
        ({**WALLED, "name": "variance_preserving"}, "reflected_ode", "walks back paths that stay inside, and variance_preserving leaves"),
        (
            {"name": "rectified_flow", "space": {"name": "inside", "domain": "ball"}},
            {"name": "reflected_ode", "walls": "bump"},
            "the bump is made for boxes; on ball set walls: reflect",
        ),
    ],
)
def test_what_walls_cannot_hold_is_refused_before_training(path: dict[str, object], sampler: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"x.yaml: sampler: .*{message}"):
        confined("flow_matching", path, sampler)


def test_what_is_wrong_with_data_names_their_key(tmp_path: Path) -> None:
    data = {"name": "watermarked", "data": "digits", "key": str(tmp_path / "none.safetensors")}
    path = {"name": "rectified_flow", "space": "dual"}
    run = parse_run(
        Document({"method": "mirror_flow", "path": path, "data": data, "model": "mlp", "training": {"samples": 64}, "output": "o"}, "x")
    )
    with pytest.raises(ConfigError, match=r"^o: data\.key: .*none\.safetensors does not exist"):
        run.fit_space()


def test_data_outside_of_the_set_are_told_before_training() -> None:
    path = {"name": "rectified_flow", "space": {"name": "dual", "domain": {"name": "box", "low": 5.0, "high": 6.0}}}
    run = confined("mirror_flow", path)
    run.fit_space()
    with pytest.raises(ConfigError, match=r"path.space: 1000 of 1000 training samples lie outside of box"):
        run.check_space()
