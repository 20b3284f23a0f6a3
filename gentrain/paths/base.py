"""Probability path: the family of noisings x_t = alpha(t) x_0 + sigma(t) eps that a model learns to undo."""

from __future__ import annotations

from torch import Tensor

from gentrain.config import Component


def expand(t: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] so that it broadcasts against `like`."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


class Path(Component, kind="path"):
    """Time runs from data (t_min) to noise (t_max). Every function takes t of any shape and works in t's dtype and device."""

    sigma_data: float = 0.5  # standard deviation of the data, for EDM preconditioning

    @property
    def t_min(self) -> float:
        raise NotImplementedError

    @property
    def t_max(self) -> float:
        raise NotImplementedError

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def alpha_prime(self, t: Tensor) -> Tensor:
        """d alpha / dt."""
        raise NotImplementedError

    def sigma_prime(self, t: Tensor) -> Tensor:
        """d sigma / dt."""
        raise NotImplementedError

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Inverse of `log_snr`."""
        raise NotImplementedError

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is given for t: on the order of diffusers' timesteps [0, 1000], for sinusoidal embeddings."""
        raise NotImplementedError

    def log_snr(self, t: Tensor) -> Tensor:
        """2 log(alpha / sigma), decreasing in t."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def perturb(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t; x0 and eps [B, ...], t [B]."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """d x_t / dt at fixed x0 and eps."""
        return expand(self.alpha_prime(t), x0) * x0 + expand(self.sigma_prime(t), x0) * eps


def convert_time(t: Tensor, source: Path, target: Path) -> Tensor:
    """The time of `target` at which its signal-to-noise ratio equals that of `source` at t."""
    return target.time_of_log_snr(source.log_snr(t))


class TimeLaw(Component, kind="time law"):
    """How training draws t."""

    def sample(self, uniform: Tensor, path: Path) -> Tensor:
        """uniform [B] in [0, 1) -> t [B] in [path.t_min, path.t_max], by the inverse of the law's distribution function.

        The method draws `uniform` from the noise it is handed, so that a sample meets the same t on any number of ranks.
        """
        raise NotImplementedError


