"""A box: every coordinate between two bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from gentrain.config import option, register
from gentrain.domains import heat_kernel
from gentrain.domains.base import Domain, OnDevice, Vector, require_converged, require_inside
from gentrain.domains.roots import increasing_root
from gentrain.noise import Noise

Kappa = Annotated[float, Field(gt=0, lt=1)]
KAPPA_HELP = "exponent of the regularised barrier: large = heavy tails in the dual, small = a barrier that is felt late"


@register("box")
@dataclass
class Box(Domain):
    """{x: low < x < high}, coordinate by coordinate, for samples of any shape: pixels in (0, 1) or (-1, 1), a watermark's slabs.

    Barriers: regularised, log, atanh. The first two have no closed inverse: a scalar root per coordinate, in the logit of its place.
    """

    folds: ClassVar[bool] = True

    low: Vector = option(0.0, "lower bound, of every coordinate or of each")
    high: Vector = option(1.0, "upper bound, of every coordinate or of each")
    barrier: Literal["regularised", "log", "atanh"] = option("regularised", "mirror map", source="arXiv:2510.08929, arXiv:2310.01236")
    kappa: Kappa = option(0.1, KAPPA_HELP, source="arXiv:2510.08929, section 5")

    def __post_init__(self) -> None:
        low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in (self.low, self.high))
        if low.ndim > 1 or high.ndim > 1 or (low.ndim and high.ndim and len(low) != len(high)):
            raise ValueError(f"low and high are numbers or lists of equal length, got shapes {tuple(low.shape)} and {tuple(high.shape)}")
        if not bool((low < high).all() and (high - low).isfinite().all()):
            raise ValueError("low must be below high in every coordinate, both finite")
        self.bounds = OnDevice(low, high)  # bounds(x) -> (low, high), float64 on the device of x

    def check_shape(self, shape: Sequence[int]) -> None:
        low, high = self.bounds(torch.empty(0))
        length = max(low.numel() if low.ndim else 0, high.numel() if high.ndim else 0)
        if length and tuple(shape) != (length,):
            raise ValueError(
                f"box has {length} bounds and is for vectors ({length},), got samples of shape {tuple(shape)}; give one bound for all of a "
                "sample, or as many as a vector is long"
            )

    def slack(self, x: Tensor) -> Tensor:
        low, high = (bound.to(x.dtype) for bound in self.bounds(x))
        return torch.cat([(x - low).flatten(1), (high - x).flatten(1)], 1)

    def interior(self, x: Tensor, margin: float = 0.0) -> Tensor:
        low, high = self.bounds(x)
        if not bool((2 * margin < high - low).all()):
            raise ValueError(f"no point is {margin} away from both bounds; the narrowest side is {float((high - low).min())}")
        return x.clamp(-_next_below(-low, -low - margin, x.dtype), _next_below(high, high - margin, x.dtype))

    def project(self, x: Tensor) -> Tensor:
        return self.interior(x)

    def fold(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x mirrored at the walls until it is inside, whether by an odd number of mirrors: bool, [B, *shape]).

        Exactly x where x is inside. Half precision is folded in float32, and x comes back in its own dtype.
        """
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        low, high = (bound.to(y.dtype) for bound in self.bounds(x))
        width = high - low
        number = ((y - low) / width).floor()
        odd = number.remainder(2) == 1
        # (number + 1) * width - (y - low), not width - remainder: a small step past a wall keeps all its digits
        folded = torch.where(odd, (2 * low + (number + 1) * width) - y, y - number * width)
        return self.interior(torch.where(number == 0, y, folded).to(x.dtype)), odd

    def reflect_with_velocity(self, x: Tensor, velocity: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        folded, odd = self.fold(x)
        return folded, torch.where(odd, -velocity, velocity)

    def uniform(self, noise: Noise, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        low, high = self.bounds(noise.rows)
        return self.interior((low + (high - low) * noise.uniform(shape)).to(dtype))

    def to_dual(self, x: Tensor) -> Tensor:
        require_inside(self.slack(x))
        low, high = self.bounds(x)
        below, above = x.double() - low, high - x.double()
        if self.barrier == "atanh":
            return ((below.log() - above.log()) / 2).to(x.dtype)
        kappa = self._exponent
        return (x.double() + above.pow(-kappa) - below.pow(-kappa)).to(x.dtype)

    def to_primal(self, z: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.bounds(z)
        width = high - low
        dual = z.double()
        logit = 2 * dual if self.barrier == "atanh" else self._logit(dual)
        x = torch.where(logit < 0, low + width * logit.sigmoid(), high - width * (-logit).sigmoid())
        log_slack = torch.cat([(width.log() + logsigmoid(side * logit)).flatten(1) for side in (1, -1)], 1)
        return self.interior(x.to(z.dtype)), log_slack.to(z.dtype)

    def hessian(self, x: Tensor) -> Tensor:
        low, high = self.bounds(x)
        below, above = x.double() - low, high - x.double()
        if self.barrier == "atanh":
            return ((1 / below + 1 / above) / 2).flatten(1).diag_embed().to(x.dtype)
        kappa = self._exponent
        return (1 + kappa * (above.pow(-kappa - 1) + below.pow(-kappa - 1))).flatten(1).diag_embed().to(x.dtype)

    @property
    def _exponent(self) -> float:
        return 1.0 if self.barrier == "log" else self.kappa

    def _logit(self, z: Tensor) -> Tensor:
        """v such that x = low + width sigmoid(v) has the dual z, float64."""
        low, high = self.bounds(z)
        width, kappa, middle = high - low, self._exponent, (low + high) / 2
        log_width = width.log()

        def residual(v: Tensor) -> tuple[Tensor, Tensor]:
            log_below, log_above = logsigmoid(v), logsigmoid(-v)  # of the slacks, as parts of the width
            from_below, from_above = (-kappa * (log_width + log_below)).exp(), (-kappa * (log_width + log_above)).exp()
            below, above = log_below.exp(), log_above.exp()
            value = low + width * below + from_above - from_below - z
            return value, width * below * above + kappa * (below * from_above + above * from_below)

        away = (z - middle).abs()
        furthest = (2**kappa + away * width**kappa).log() / kappa  # from x >= middle where v >= 0
        slope = width / 4 + kappa * (width / 2) ** -kappa  # at the middle, where it is least
        guess = torch.minimum(furthest, away / slope) * (z - middle).sign()
        v = increasing_root(residual, -furthest, furthest, guess)
        require_converged(residual(v)[0].abs().flatten(1).amax(1), 1e-9 * (1 + z.abs().flatten(1).amax(1)))
        return v

    def heat_kernel_score(self, x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
        """d log p(x | x0) / dx of each coordinate, p the law of x0 + sigma z folded into the box, z standard normal: [B, *shape].

        x and x0 [B, *shape] inside or on the boundary; sigma a number, [B], or of x's dimensions. Zero at the walls. float32 is right to
        1e-5 / sigma for sigma >= 0.01 of the width (see `heat_kernel`).
        """
        u, u0, sigma, width = self._unit(x, x0, sigma)
        return heat_kernel.score(u, u0, sigma) / width

    def heat_kernel_log_density(self, x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
        """log p(x | x0) of each coordinate (see `heat_kernel_score`): [B, *shape]; the whole sample's is its sum."""
        u, u0, sigma, width = self._unit(x, x0, sigma)
        return heat_kernel.log_density(u, u0, sigma) - width.log()

    def _unit(self, x: Tensor, x0: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, x0 and sigma in units of the box, and its width."""
        low, high = (bound.to(x.dtype) for bound in self.bounds(x))
        width = high - low
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        if sigma.ndim == 1:
            sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
        return (x - low) / width, (x0 - low) / width, sigma / width, width


def _next_below(bound: Tensor, most: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number of `dtype` that is at most `most` and strictly below `bound`, also below what rounding makes of `bound`.

    bound and most are float64. The number is no subnormal: devices flush those to 0.
    """
    value = most.to(dtype)
    bound = torch.minimum(bound, bound.to(dtype).double())
    value = torch.where(
        (value.double() > most) | (value.double() >= bound), torch.nextafter(value, torch.full_like(value, -torch.inf)), value
    )
    smallest = torch.full_like(value, torch.finfo(dtype).tiny)
    return torch.where((value.abs() < smallest) & (value != 0), -smallest, value)
