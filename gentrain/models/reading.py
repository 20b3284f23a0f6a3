"""A denoiser read on another path, by equal signal-to-noise ratio."""

from __future__ import annotations

from torch import Tensor

from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.paths.base import Path, convert_time, expand


class Reading(Denoiser):
    """The denoiser as one that predicts velocity on `path`: still one network call, differentiable in x_t and t.

    x_t = alpha x0 + sigma eps of one path is that of another at the time of equal sigma / alpha, up to a factor. Where the denoiser's own
    path ends earlier (log-SNR beyond its ends), its nearer end answers.
    """

    def __init__(self, denoiser: Denoiser, path: Path):
        super().__init__(denoiser.network, path, "velocity")
        self.own = denoiser

    def raw(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        there = convert_time(t, self.path, self.own.path)
        x_there = x_t * expand(length(self.own.path, there) / length(self.path, t), x_t)
        return self.own._combine(x_there, there, condition, self.path.alpha_prime(t), self.path.sigma_prime(t))


def length(path: Path, t: Tensor) -> Tensor:
    """sqrt(alpha^2 + sigma^2), by which x_t of two paths differ at equal signal-to-noise ratio."""
    return (path.alpha(t) ** 2 + path.sigma(t) ** 2).sqrt()


def read_on(denoiser: Denoiser, path: Path) -> Denoiser:
    """The denoiser itself where `path` is its own."""
    return denoiser if denoiser.path == path else Reading(denoiser, path)
