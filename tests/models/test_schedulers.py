"""What a Denoiser makes of a pipeline's network against one step of each of diffusers' schedulers that the pipeline may name."""

from __future__ import annotations

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
]
OF_FLOWS: list[tuple[str, dict[str, Any]]] = [
    ("FlowMatchEulerDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
    ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
]


def network(x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
    """As good as any other: what counts is how its output is read. Of times it sees whole ones, as some schedulers tell them."""
    return 0.7 * x.flip(-1) + ((t + 0.01).floor() / 1000)[:, None, None, None] - 0.2


def named(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0].removesuffix("Scheduler"), *(str(value) for value in case[1].values() if value not in BETAS.values())])


@pytest.mark.parametrize("case", [*OF_BETAS, *OF_FLOWS], ids=named)
def test_a_denoiser_takes_the_first_step_of_the_scheduler(case: tuple[str, dict[str, Any]]) -> None:
    """From its first time to its second, which every solver takes with one value of the network: alpha' x0 + sigma' eps."""
    cls = getattr(diffusers, case[0])
    scheduler = cls.from_config({**case[1], "num_train_timesteps": 1000})
    path, prediction = law_of(cls, case[1])
    denoiser = Denoiser(network, path, prediction)
    scheduler.set_timesteps(8)
    first, flow = scheduler.timesteps[0], isinstance(path, RectifiedFlow)
    assert flow == (case in OF_FLOWS)
    x_t = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0))
    t = torch.full((2,), float(scheduler.sigmas[0]) if flow else float(first))
    x0, eps = denoiser.x0(x_t, t), denoiser.eps(x_t, t)
    velocity, score = denoiser.velocity(x_t, t), denoiser.score(x_t, t)
    scaled = {"EulerDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"} & {case[0]}  # walk in x_t / alpha
    alpha, sigma = path.alpha(t[:1]).item(), path.sigma(t[:1]).item()
    given = x_t / alpha if scaled else x_t
    read = scheduler.scale_model_input(given, first) if hasattr(scheduler, "scale_model_input") else given
    output = network(read, t * (1000 if flow else 1))
    after = scheduler.step(output, first, given, return_dict=False)[0]
    if flow:
        alpha_to, sigma_to = 1 - float(scheduler.sigmas[1]), float(scheduler.sigmas[1])
    elif hasattr(scheduler, "sigmas"):
        sigma_to = float(scheduler.sigmas[1]) if case[0] != "HeunDiscreteScheduler" else float(scheduler.sigmas[2])
        alpha_to, sigma_to = 1 / (1 + sigma_to**2) ** 0.5, sigma_to / (1 + sigma_to**2) ** 0.5
    else:
        product = float(scheduler.alphas_cumprod[int(first) - 125])
        alpha_to, sigma_to = product**0.5, (1 - product) ** 0.5
    expected = alpha_to * x0 + sigma_to * eps
    torch.testing.assert_close(after * alpha_to if scaled else after, expected, rtol=1e-3, atol=1e-3)
    # what the other readings say is the same network
    torch.testing.assert_close(velocity, path.alpha_prime(t[:1]) * x0 + path.sigma_prime(t[:1]) * eps, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(score * sigma, -eps, rtol=1e-4, atol=1e-4)
