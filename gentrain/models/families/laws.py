"""The path and prediction that a scheduler's configuration means."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.variance_preserving import VariancePreserving

if TYPE_CHECKING:
    from gentrain.models.denoiser import Prediction

_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
# Those whose steps were compared with a Denoiser's; others may change the betas by keys of their own.
_KNOWN = frozenset({
    "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler",
    "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
})  # fmt: skip
_SIGMA_DATA = 1.0  # latents are scaled to about unit variance


def law_of(scheduler: type, config: dict[str, Any]) -> tuple[Path, Prediction]:
    """The path and prediction of a model that is sampled with `scheduler`, a class of diffusers, configured by `config`.

    Raises ValueError for a scheduler that means neither a variance preserving path nor a rectified flow.
    """
    if scheduler.__name__ not in _KNOWN:
        known = ", ".join(sorted(_KNOWN))
        raise ValueError(f"the pipeline's scheduler {scheduler.__name__} means no path that is known here; known: {known}")
    taken = inspect.signature(scheduler).parameters.items()
    complete = {name: value.default for name, value in taken if value.default is not inspect.Parameter.empty} | config
    if scheduler.__name__.startswith("FlowMatch"):
        return _flow(complete.get("shift")), "velocity"
    if complete.get("prediction_type") == "flow_prediction":
        return _flow(complete.get("flow_shift")), "velocity"
    schedule, prediction = _SCHEDULES.get(complete.get("beta_schedule", "")), _PREDICTIONS.get(complete.get("prediction_type", "epsilon"))
    if schedule is None or prediction is None or complete.get("trained_betas") is not None:
        said = {key: complete.get(key) for key in ("beta_schedule", "prediction_type", "trained_betas")}
        raise ValueError(f"the pipeline's scheduler {scheduler.__name__} with {said} means no path that is known here")
    path = VariancePreserving(
        schedule=schedule,  # type: ignore[arg-type]
        num_train_timesteps=complete["num_train_timesteps"],
        beta_start=complete["beta_start"],
        beta_end=complete["beta_end"],
        zero_terminal_snr=bool(complete.get("rescale_betas_zero_snr")),
        sigma_data=_SIGMA_DATA,
    )
    return path, prediction


def _flow(shift: float | None) -> RectifiedFlow:
    if shift is not None and not 0 < shift < math.inf:
        raise ValueError(f"the pipeline's scheduler has a shift of {shift}, no positive number; mend its scheduler_config.json")
    return RectifiedFlow(shift=shift or 1.0, sigma_data=_SIGMA_DATA)
