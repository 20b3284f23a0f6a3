"""A few calls of a student: the times, what the sampler draws, and the simulation of it in training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.trigflow import TrigFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.samplers.few_step import FewStep, call_times, require_apart, require_few_step, simulate
from gentrain.samplers.one_step import OneStep, generate
from tests.samplers.toy import CONDITION, SHAPE, noise_for, toy_network

CLOSE = {"rtol": 2e-5, "atol": 1e-5}  # times are float64 here, float32 there
PATHS = [RectifiedFlow(), VariancePreserving(), TrigFlow(), VarianceExploding()]


def denoiser_of(path: Path) -> Denoiser:
    return Denoiser(toy_network, path, "edm" if path.unbounded else "velocity")


def test_the_times_are_equally_spaced_with_clean_data_next() -> None:
    torch.testing.assert_close(call_times(RectifiedFlow(), 2.5, 4), 5 / 7 * torch.tensor([1, 0.75, 0.5, 0.25], dtype=torch.float64))
    times = call_times(VarianceExploding(), 2.5, 2)
    assert times.tolist() == pytest.approx([2.5, (2.5 + VarianceExploding().t_min) / 2])


@pytest.mark.parametrize("path", PATHS)
def test_one_step_of_it_is_one_step(path: Path) -> None:
    drawn = FewStep(steps=1, sigma=2.0).sample(denoiser_of(path), SHAPE, noise_for(), CONDITION)
    expected = OneStep(sigma=2.0).sample(denoiser_of(path), SHAPE, noise_for(), CONDITION)
    torch.testing.assert_close(drawn, expected, **CLOSE)


@pytest.mark.parametrize("path", PATHS)
def test_three_steps_by_hand(path: Path) -> None:
    denoiser, noise = denoiser_of(path), noise_for()
    drawn = FewStep(steps=3).sample(denoiser, SHAPE, noise_for(), CONDITION)
    x = generate(denoiser, noise.normal(SHAPE), 2.5, CONDITION)
    for t in call_times(path, 2.5, 3)[1:]:
        t = t.to(x).expand(len(x))
        x = denoiser.x0(path.perturb(x, noise.normal(SHAPE), t), t, CONDITION)
    torch.testing.assert_close(drawn, x, **CLOSE)


def test_the_jumps_draw_what_the_sampler_draws() -> None:
    denoiser, sampler, noise = denoiser_of(RectifiedFlow()), FewStep(steps=3), noise_for()
    x = sampler.start(denoiser.path) * noise.normal(SHAPE)
    for index in range(3):
        jump = sampler.jump(denoiser, x, index, CONDITION)
        x = jump.mean if index == 2 else jump.mean + jump.deviation * noise.normal(SHAPE)
    assert jump.deviation == 0
    torch.testing.assert_close(x, sampler.sample(denoiser, SHAPE, noise_for(), CONDITION))


def test_a_gaussian_student_draws_the_law_that_the_calls_imply() -> None:
    """Of data N(0, 1) with exact denoisers x0 = alpha x / (alpha^2 + sigma^2): variance by recursion."""
    path, sampler = RectifiedFlow(), FewStep(steps=3)
    exact = Denoiser(lambda x, t, c: x * ((1 - t / 1000) / ((1 - t / 1000) ** 2 + (t / 1000) ** 2))[:, None], path, "x0")
    drawn = sampler.sample(exact, (100_000, 1), Noise(0, torch.arange(100_000)))
    variance = None
    for t in call_times(path, 2.5, 3).tolist():
        arriving = t**2 + (0 if variance is None else (1 - t) ** 2 * variance)
        variance = arriving * ((1 - t) / ((1 - t) ** 2 + t**2)) ** 2
    assert drawn.std().item() == pytest.approx(math.sqrt(variance), rel=0.01)


@pytest.mark.parametrize("path", PATHS)
def test_the_simulation_stops_each_row_where_its_call_reads(path: Path) -> None:
    """Rows of the last call give the sampler's own samples; the others what the calls before had come to."""
    denoiser, sampler, noise = denoiser_of(path), FewStep(steps=3), noise_for()
    z = noise.normal(SHAPE)
    stage = torch.tensor([2, 0, 1, 2, 0, 1])
    x_t, t = simulate(denoiser, sampler, z, stage, noise, CONDITION)
    times = call_times(path, 2.5, 3)
    torch.testing.assert_close(t.double(), times[stage], rtol=1e-6, atol=0)
    drawn = sampler.sample(denoiser, SHAPE, noise_for(), CONDITION)
    torch.testing.assert_close(denoiser.x0(x_t, t, CONDITION)[stage == 2], drawn[stage == 2], **CLOSE)
    torch.testing.assert_close(x_t[stage == 0], (sampler.start(path) * z)[stage == 0])
    again = noise_for()
    first = generate(denoiser, again.normal(SHAPE), 2.5, CONDITION)
    second = path.perturb(first, again.normal(SHAPE), times[1].float().expand(6))
    torch.testing.assert_close(x_t[stage == 1], second[stage == 1], **CLOSE)


def test_no_gradient_passes_through_the_calls_before() -> None:
    weight, seen = torch.ones(3, requires_grad=True), []

    def network(x: Tensor, t: Tensor, condition: dict | None) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return weight * x

    student, noise = Denoiser(network, RectifiedFlow(), "x0"), noise_for()
    x_t, t = simulate(student, FewStep(steps=3), noise.normal(SHAPE), torch.full((6,), 2), noise, None)
    assert not x_t.requires_grad and seen == [False, False]
    student.x0(x_t, t).sum().backward()
    torch.testing.assert_close(weight.grad, x_t.sum((0, 1, 2)))


@pytest.mark.parametrize("path", [RectifiedFlow(), VariancePreserving()])
def test_schedulers_of_diffusers_draw_the_same(path: Path) -> None:
    """Those that the card of an exported pipeline names; the variance-preserving one rounds times to timesteps."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

    times = call_times(path, 2.5, 3)
    if path.pure_noise:
        scheduler, prediction = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "velocity"
        scheduler.set_timesteps(sigmas=times.tolist())
    else:
        scheduler, prediction = LCMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False), "eps"
        scheduler.set_timesteps(timesteps=times.round().int().tolist(), original_inference_steps=1000)
    torch.manual_seed(0)
    x = FewStep(steps=3).start(path) * noise_for().normal(SHAPE)
    for t in scheduler.timesteps:
        output = toy_network(x, torch.full((6,), float(t)), CONDITION)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    torch.manual_seed(0)

    class ThenTorch(Noise):
        def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
            return super().normal(shape, dtype) if self._calls == 0 else torch.randn(shape)

    drawn = FewStep(steps=3).sample(Denoiser(toy_network, path, prediction), SHAPE, ThenTorch(0, torch.arange(6)), CONDITION)
    torch.testing.assert_close(x, drawn, rtol=0, atol=1e-4 if path.pure_noise else 0.02)


@pytest.mark.parametrize(("path", "most"), [(RectifiedFlow(), 714), (TrigFlow(), 874), (VarianceExploding(), 250)])
def test_more_calls_than_timesteps_are_refused(path: Path, most: int) -> None:
    require_apart(path, 2.5, most)
    FewStep(steps=1).check(path)
    for steps in (most + 1, 10**12):
        with pytest.raises(ValueError, match=rf"the times of {steps} calls apart; take at most {most} "):
            FewStep(steps=steps).check(path)


def test_other_samplers_are_refused_with_the_remedy() -> None:
    require_few_step(FewStep(steps=3, sigma=2.0), 2.0, 3)
    for other, got in (
        (FewStep(steps=4, sigma=2.0), "few_step with 4 steps at sigma 2;"),
        (FewStep(steps=3), "few_step with 3 steps at sigma 2.5;"),
        (OneStep(sigma=2.0), "one_step;"),
    ):
        told = f"drawn from by {got} leave the sampler out, or set it to .name: few_step, steps: 3, sigma: 2"
        with pytest.raises(ValueError, match=told):
            require_few_step(other, 2.0, 3)
    with pytest.raises(ValueError, match="a few-step student is not guided"):
        FewStep(guidance=2.0)
