"""The variance-preserving path of DDPM, with diffusers' noise schedules and timesteps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from gentrain.config import option, register
from gentrain.paths.base import Path


@register("variance_preserving")
@dataclass
class VariancePreserving(Path):
    """alpha^2 + sigma^2 = 1 (arXiv:2006.11239). t is diffusers' timestep as a float in [0, num_train_timesteps - 1].

    Between two timesteps the log-SNR is linear in t. Timestep 0 still holds some noise: clean data stand at t = -1, where no network is
    ever asked.
    """

    schedule: Literal["linear", "scaled_linear", "cosine"] = option(
        "linear", "betas: linear (DDPM), scaled_linear (Stable Diffusion), cosine (arXiv:2102.09672; diffusers' squaredcos_cap_v2)"
    )
    num_train_timesteps: PositiveInt = option(1000, "number of timesteps T", source="arXiv:2006.11239")
    beta_start: PositiveFloat = option(1e-4, "beta at timestep 0; the cosine schedule has none", source="arXiv:2006.11239")
    beta_end: PositiveFloat = option(0.02, "beta at timestep T - 1; the cosine schedule has none", source="arXiv:2006.11239")
    zero_terminal_snr: bool = option(False, "alpha is shifted and scaled to end at 2^-12, next to nothing", source="arXiv:2305.08891")

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 2:
            raise ValueError("num_train_timesteps must be at least 2")
        if not self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start {self.beta_start} and beta_end {self.beta_end} must satisfy beta_start <= beta_end < 1")
        log_alpha_bar = torch.log1p(-self._betas()).cumsum(0)
        if self.zero_terminal_snr:
            alpha = (log_alpha_bar / 2).exp()
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
            alpha[-1] = 2.0**-12  # as diffusers' EulerDiscreteScheduler: of pure noise there is no log-SNR
            log_alpha_bar = 2 * alpha.log()
        # log(alpha_bar / (1 - alpha_bar)), without the cancellation of 1 - alpha_bar near the data
        self._table = log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))
        self._tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def _betas(self) -> Tensor:
        count = self.num_train_timesteps
        if self.schedule == "linear":
            return torch.linspace(self.beta_start, self.beta_end, count, dtype=torch.float64)
        if self.schedule == "scaled_linear":
            return torch.linspace(self.beta_start**0.5, self.beta_end**0.5, count, dtype=torch.float64) ** 2
        angle = (torch.arange(count + 1, dtype=torch.float64) / count + 0.008) / 1.008 * math.pi / 2
        alpha_bar = angle.cos() ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)

    def _log_snr_table(self, like: Tensor) -> Tensor:
        """[T], kept per device: a copy from the host at every call would stall an accelerator."""
        key = (like.dtype, like.device)
        if key not in self._tables:
            self._tables[key] = self._table.to(like)
        return self._tables[key]

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(timestep below t, log-SNR there, its slope to the next timestep)."""
        table = self._log_snr_table(t)
        below = t.floor().clamp(0, self.num_train_timesteps - 2).long()
        return below, table[below], table[below + 1] - table[below]

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return float(self.num_train_timesteps - 1)

    def log_snr(self, t: Tensor) -> Tensor:
        below, value, slope = self._segment(t)
        return value + slope * (t - below)

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_snr(t).sigmoid().sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (-self.log_snr(t)).sigmoid().sqrt()

    def alpha_prime(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self.sigma(t) ** 2 * self._segment(t)[2] / 2

    def sigma_prime(self, t: Tensor) -> Tensor:
        return -self.sigma(t) * self.alpha(t) ** 2 * self._segment(t)[2] / 2

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        table = self._log_snr_table(log_snr)
        log_snr = log_snr.clamp(table[-1], table[0])
        below = (torch.searchsorted(-table, -log_snr, right=True) - 1).clamp(0, self.num_train_timesteps - 2)
        return below + (log_snr - table[below]) / (table[below + 1] - table[below])

    def network_time(self, t: Tensor) -> Tensor:
        return t

    def jump_times(self, steps: int) -> Tensor:
        if steps >= self.num_train_timesteps:
            most = self.num_train_timesteps - 1
            raise ValueError(f"{steps} steps between {self.num_train_timesteps} timesteps; take at most {most}")
        return super().jump_times(steps)

    def sampling_times(self, steps: int) -> Tensor:
        """Integer timesteps, equally spaced up to rounding, from T - 1 towards -1: diffusers' "trailing" spacing (arXiv:2305.08891).

        Raises:
            ValueError: more steps than timesteps.
        """
        if steps > self.num_train_timesteps:
            raise ValueError(f"{steps} steps on a path of {self.num_train_timesteps} timesteps; take at most that many")
        return (self.num_train_timesteps - torch.arange(steps, dtype=torch.float64) * (self.num_train_timesteps / steps)).round() - 1
