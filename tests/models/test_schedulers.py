"""What a Denoiser makes of a pipeline's network against one step of each of diffusers' schedulers that the pipeline may name."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from gentrain.models.denoiser import Denoiser
from gentrain.models.families.laws import law_of
from gentrain.paths.rectified_flow import RectifiedFlow

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO = {**BETAS, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
DDIM: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False}
OF_BETAS: list[tuple[str, dict[str, Any]]] = [  # those that walk in x_t, and those that walk in x_t / alpha
    *(("DDIMScheduler", {**BETAS, **DDIM, "prediction_type": kind}) for kind in ("epsilon", "v_prediction", "sample")),
    ("DDIMScheduler", {**ZERO, **DDIM}),
    ("DDIMScheduler", {"beta_schedule": "linear", **DDIM}),
    ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2", **DDIM}),
    ("DPMSolverMultistepScheduler", BETAS),
    ("DPMSolverMultistepScheduler", {**BETAS, "prediction_type": "v_prediction", "use_karras_sigmas": True}),
    ("DPMSolverSinglestepScheduler", BETAS),
    ("DEISMultistepScheduler", BETAS),
    ("UniPCMultistepScheduler", {**BETAS, "prediction_type": "v_prediction"}),
    ("EulerDiscreteScheduler", BETAS),
    ("EulerDiscreteScheduler", {**BETAS, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", ZERO),
    ("LMSDiscreteScheduler", BETAS),
    ("HeunDiscreteScheduler", {**BETAS, "prediction_type": "v_prediction"}),
    ("PNDMScheduler", {**BETAS, "skip_prk_steps": True, "set_alpha_to_one": False}),
    ("PNDMScheduler", {**BETAS, "skip_prk_steps": True, "prediction_type": "v_prediction"}),
    ("DDIMParallelScheduler", {**BETAS, **DDIM}),
    ("DDPMScheduler", {**BETAS, "clip_sample": False}),
    ("DDPMScheduler", {**BETAS, "clip_sample": False, "prediction_type": "v_prediction"}),
    ("DDPMParallelScheduler", {**BETAS, "clip_sample": False}),
    ("EulerAncestralDiscreteScheduler", BETAS),
    ("EulerAncestralDiscreteScheduler", ZERO),
    ("KDPM2DiscreteScheduler", BETAS),
    ("KDPM2AncestralDiscreteScheduler", {**BETAS, "prediction_type": "v_prediction"}),
    ("LCMScheduler", {**BETAS, "clip_sample": False}),
    ("TCDScheduler", BETAS),
    ("SASolverScheduler", BETAS),
]
OF_FLOWS: list[tuple[str, dict[str, Any]]] = [
    ("FlowMatchEulerDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchLCMScheduler", {"shift": 3.0}),
    ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
    ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
    ("SASolverScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
]
SCALED = {"EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"}  # x / alpha
RENEWED = ("DDPM", "DDPMParallel", "EulerAncestralDiscrete")  # some of the noise, as much as DDPM's posterior has
FRESH = ("LCM", "FlowMatchLCM")  # all of it


def network(x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
    """As good as any other: what counts is how its output is read. Of times it sees whole ones, as some schedulers tell them."""
    return 0.7 * x.flip(-1) + ((t + 0.01).floor() / 1000)[:, None, None, None] - 0.2


def named(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0].removesuffix("Scheduler"), *(str(value) for value in case[1].values() if value not in BETAS.values())])


@pytest.mark.parametrize("case", [*OF_BETAS, *OF_FLOWS], ids=named)
def test_a_denoiser_takes_the_first_step_of_the_scheduler(case: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first time to its second, which every solver takes with one value of the network: alpha' x0 + sigma' eps, or fresh noise."""
    cls, kind = getattr(diffusers, case[0]), case[0].removesuffix("Scheduler")
    scheduler = cls.from_config({**case[1], "num_train_timesteps": 1000})
    path, prediction = law_of(cls, case[1])
    denoiser = Denoiser(network, path, prediction)
    scheduler.set_timesteps(8)
    first, flow = scheduler.timesteps[0], isinstance(path, RectifiedFlow)
    assert flow == (case in OF_FLOWS)
    if isinstance(path, RectifiedFlow):
        assert path.shift == case[1].get("shift", case[1].get("flow_shift", 1.0))
    x_t, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.manual_seed(0))
    if hasattr(module := inspect.getmodule(cls), "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
    t = torch.full((2,), float(scheduler.sigmas[0]) if flow else float(first))
    x0, eps = denoiser.x0(x_t, t), denoiser.eps(x_t, t)
    velocity, score = denoiser.velocity(x_t, t), denoiser.score(x_t, t)
    alpha, sigma = path.alpha(t[:1]).item(), path.sigma(t[:1]).item()
    given = x_t / alpha if kind in SCALED else x_t
    read = scheduler.scale_model_input(given, first) if hasattr(scheduler, "scale_model_input") else given
    output = network(read, t * (1000 if flow else 1))
    after = scheduler.step(output, first, given, **({"eta": 0.0} if kind == "TCD" else {}), return_dict=False)[0]
    alpha_to, sigma_to = _second(scheduler, kind, flow, float(first))
    renewed = sigma_to**2 / sigma**2 * (1 - alpha**2 / alpha_to**2) if kind in RENEWED else sigma_to**2 if kind in FRESH else 0.0
    expected = alpha_to * x0 + max(sigma_to**2 - renewed, 0.0) ** 0.5 * eps + renewed**0.5 * noise
    torch.testing.assert_close(after * alpha_to if kind in SCALED else after, expected, rtol=1e-3, atol=1e-3)
    # what the other readings say is the same network
    torch.testing.assert_close(velocity, path.alpha_prime(t[:1]) * x0 + path.sigma_prime(t[:1]) * eps, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(score * sigma, -eps, rtol=1e-4, atol=1e-4)


def _second(scheduler: Any, kind: str, flow: bool, first: float) -> tuple[float, float]:
    """alpha and sigma of where the scheduler's first step ends."""
    if flow:
        return 1 - float(scheduler.sigmas[1]), float(scheduler.sigmas[1])
    if hasattr(scheduler, "sigmas"):
        halfway = {"KDPM2Discrete": 1, "KDPM2AncestralDiscrete": 0}
        sigma = float(scheduler.sigmas_interpol[halfway[kind]] if kind in halfway else scheduler.sigmas[2 if kind == "HeunDiscrete" else 1])
        return 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
    to = int(scheduler.timesteps[1]) if kind in ("LCM", "TCD") else int(first) - 125
    product = float(scheduler.alphas_cumprod[to])
    return product**0.5, (1 - product) ** 0.5


def test_every_other_scheduler_is_refused() -> None:
    tested = {name for name, _ in (*OF_BETAS, *OF_FLOWS)}
    others = [name for name in dir(diffusers) if name.endswith("Scheduler") and name not in tested]
    assert len(others) > 10
    for name in others:
        with pytest.raises(ValueError, match=f"scheduler {name} means no path that is known here; known: DDIMParallelScheduler, "):
            law_of(type(name, (), {}), {})
    for config in ({"trained_betas": [0.1, 0.2]}, {"beta_schedule": "sigmoid"}, {"prediction_type": "sigma"}):
        with pytest.raises(ValueError, match=r"scheduler DDPMScheduler with \{.*\} means no path"):
            law_of(diffusers.DDPMScheduler, config)
