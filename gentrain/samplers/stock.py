"""The arguments with which diffusers' own schedulers take gentrain's steps."""

from __future__ import annotations

from typing import Any

from gentrain.models.denoiser import Prediction
from gentrain.paths.base import Path
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.paths.variance_preserving import VariancePreserving

_PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def variance_preserving_arguments(path: Path, prediction: Prediction, karras: bool = False) -> dict[str, Any] | None:
    """For the schedulers of DDPM's family; None if the path or the prediction is none of theirs."""
    if not isinstance(path, VariancePreserving) or prediction not in _PREDICTION_TYPES:
        return None
    return {
        "num_train_timesteps": path.num_train_timesteps,
        "beta_start": path.beta_start,
        "beta_end": path.beta_end,
        "beta_schedule": _BETA_SCHEDULES[path.schedule],
        "prediction_type": _PREDICTION_TYPES[prediction],
        **({"rescale_betas_zero_snr": True} if path.zero_terminal_snr else {}),
        # with Karras spacing, diffusers takes the ends of the noise levels from the timesteps: only this spacing has both ends
        **({"use_karras_sigmas": True, "timestep_spacing": "linspace"} if karras else {"timestep_spacing": "trailing"}),
    }


def edm_arguments(path: Path, prediction: Prediction) -> dict[str, Any] | None:
    """For the EDM schedulers; None if the path or the prediction is none of theirs."""
    if not isinstance(path, VarianceExploding) or prediction != "edm":
        return None
    return {"sigma_min": path.sigma_min, "sigma_max": path.sigma_max, "sigma_data": path.sigma_data}
