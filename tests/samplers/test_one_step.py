"""One step: what the student is trained to draw, at the noise level where every path agrees."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.methods.base import Batch, Clock, Loss, Method, Nets, Role, Trained, Update
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.trigflow import TrigFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.recipes.export import Export
from gentrain.recipes.generate import Generate
from gentrain.samplers.base import Sampler
from gentrain.samplers.euler import Euler
from gentrain.samplers.one_step import OneStep, as_affine, generate, require_one_step, time_at
from gentrain.training.run import load_run, open_run, save_config
from tests.samplers.toy import CONDITION, SHAPE, noise_for, toy_network

PATHS = [RectifiedFlow(), VariancePreserving(), TrigFlow(), VarianceExploding()]
RUN = "method: {name: test_one_step}\ndata: rings\nmodel: mlp\nengine: torch\ntraining: {samples: 64, batch_size: 16}\n"


@register("test_one_step")
@dataclass
class _Method(Method):
    sigma: float = option(2.5, "noise level")
    roles: ClassVar[dict[str, Role]] = {"student": Trained()}
    generator: ClassVar[str | None] = "student"

    def own_sampler(self) -> Sampler:
        return OneStep(sigma=self.sigma)

    def check_sampler(self, sampler: Sampler) -> None:
        require_one_step(sampler, self.sigma)

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("student", self.loss)

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        return Loss(nets.student.x0(batch["x"], torch.ones(len(batch["x"]))).square().mean())


def prediction_of(path: Path) -> str:
    return "edm" if path.unbounded else "velocity"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sigma", [0.4, 2.5, 30.0])
def test_the_network_reads_noise_alone_at_the_level_sigma(path: Path, sigma: float) -> None:
    seen = {}

    def x0_network(x: Tensor, t: Tensor, condition: dict | None) -> Tensor:
        seen.update(x=x, t=t)
        return x

    t = torch.tensor(time_at(path, sigma), dtype=torch.float64)
    assert float(path.sigma(t) / path.alpha(t)) == pytest.approx(sigma, rel=1e-9)
    z = torch.randn(4, 2, dtype=torch.float64)
    generate(Denoiser(x0_network, path, "x0"), z, sigma, None)
    # by hand: sigma(t) where sigma / alpha is known; an exploding path's network is given x_t / its deviation
    level = {
        "rectified_flow": sigma / (1 + sigma),
        "variance_preserving": sigma / math.hypot(1, sigma),
        "trigflow": 0.5 * math.sin(math.atan(2 * sigma)),
        "variance_exploding": sigma / math.hypot(sigma, 0.5),
    }[path.registered_name]
    torch.testing.assert_close(seen["x"], level * z)


def test_on_a_rectified_flow_the_default_time_is_five_sevenths() -> None:
    assert time_at(RectifiedFlow(), 2.5) == pytest.approx(5 / 7)


@pytest.mark.parametrize("path", PATHS)
def test_the_sampler_draws_what_the_student_is_trained_to(path: Path) -> None:
    denoiser = Denoiser(toy_network, path, prediction_of(path))
    drawn = OneStep(sigma=2.0).sample(denoiser, SHAPE, noise_for(), CONDITION)
    torch.testing.assert_close(drawn, generate(denoiser, noise_for().normal(SHAPE), 2.0, CONDITION))
    assert not torch.allclose(drawn, generate(denoiser, noise_for().normal(SHAPE), 2.0, None))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "velocity", "edm"])
def test_its_affine_form_is_the_same_map(path: Path, prediction: str) -> None:
    denoiser = Denoiser(toy_network, path, prediction)
    numbers = as_affine(denoiser, time_at(path, 2.5))
    assert numbers["sigma"] / numbers["alpha"] == pytest.approx(2.5)
    z = noise_for().normal(SHAPE, torch.float64)
    x = numbers["sigma"] * z
    output = toy_network(numbers["input_scale"] * x, torch.full((6,), numbers["timestep"], dtype=torch.float64), CONDITION)
    torch.testing.assert_close(numbers["x_weight"] * x + numbers["output_weight"] * output, generate(denoiser, z, 2.5, CONDITION))


def test_gradients_reach_the_network_and_the_noise() -> None:
    z = torch.randn(3, 2, requires_grad=True)
    weight = torch.ones(2, requires_grad=True)
    generate(Denoiser(lambda x, t, c: weight * x, RectifiedFlow(), "x0"), z, 2.5, None).sum().backward()
    torch.testing.assert_close(z.grad, torch.full_like(z, 5 / 7))
    torch.testing.assert_close(weight.grad, (5 / 7 * z).sum(0).detach())


@pytest.mark.parametrize(
    ("fields", "message"), [({"steps": 2}, "takes 1 step, not 2; leave steps out"), ({"guidance": 2.0}, "leave guidance out")]
)
def test_more_steps_and_guidance_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OneStep(**fields)


def test_a_level_that_the_path_never_has_is_refused() -> None:
    with pytest.raises(ValueError, match="variance_exploding never has sigma / alpha = 100, the nearest is 80; set sigma"):
        time_at(VarianceExploding(), 100.0)


def run_of(directory: FilePath, text: str = RUN, *overrides: str):
    (directory / "main.yaml").write_text(text)
    return load_run(directory / "main.yaml", [f"output={directory / 'run'}", *overrides])


def test_a_run_that_names_no_sampler_has_its_methods_own(tmp_path: FilePath) -> None:
    assert run_of(tmp_path, RUN, "method.sigma=1.5").sampler == OneStep(sigma=1.5)
    assert run_of(tmp_path, RUN.replace("{name: test_one_step}", "flow_matching")).sampler == Euler()
    assert run_of(tmp_path, RUN.replace("{name: test_one_step}", "flow_matching"), "sampler.steps=7").sampler == Euler(steps=7)
    run = run_of(tmp_path)
    save_config(run)
    assert open_run(run.directory).sampler == run.sampler == OneStep()  # the resolved configuration says so


@pytest.mark.parametrize("sampler", ["euler", "{name: one_step, sigma: 3.0}", "{name: euler, steps: 1}", "{guidance: 2}"])
def test_a_sampler_that_contradicts_the_method_is_refused_as_the_file_loads(tmp_path: FilePath, sampler: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_of(tmp_path, RUN + f"sampler: {sampler}\n")
    assert caught.value.key == "sampler" and caught.value.source == str(tmp_path / "main.yaml")
    assert "one step at sigma 2.5" in caught.value.message and "leave the sampler out" in caught.value.message


def test_stages_refuse_it_too(tmp_path: FilePath) -> None:
    run = run_of(tmp_path)
    save_config(run)
    with pytest.raises(ConfigError, match="leave the sampler out"):
        Generate(run=str(run.directory), sampler=Euler()).execute(tmp_path / "drawn")
    with pytest.raises(ConfigError, match="has no checkpoint yet"):  # with its own sampler it gets further
        Generate(run=str(run.directory)).execute(tmp_path / "drawn")
    assert Export(run=str(run.directory)).sampler is None
