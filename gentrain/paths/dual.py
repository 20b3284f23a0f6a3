"""Paths in the mirror image of a convex set."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import AllowInfNan, Field, PositiveFloat
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data
from gentrain.domains.base import Domain
from gentrain.noise import Noise
from gentrain.paths.inside import domain_of, first_items, require_held
from gentrain.paths.space import Space

log = logging.getLogger(__name__)

Degrees = Annotated[float, Field(ge=1), AllowInfNan()]  # below 1/2 single draws are infinite in float32
_MEASURED = 10_000  # items from which mean and deviation are taken, at most


def student_t(noise: Noise, shape: tuple[int, ...], nu: float) -> Tensor:
    """Multivariate Student-t numbers of `nu` degrees of freedom and identity scale, float32 [B, ...]; normal ones for nu = inf.

    One chi-square number per row divides all its coordinates (arXiv:2510.08929, section 3): z = n sqrt(nu / chi2). The density is
    proportional to (1 + |z|^2 / nu)^(-(nu + D) / 2), and E |z|^2 = D nu / (nu - 2).
    """
    normal = noise.normal(shape)
    if nu == float("inf"):
        return normal
    from scipy.special import chdtri

    # 48 bits of two draws, never 0 or 1: the 24 of one would cut the tails off at 2^-24
    uniform = noise.uniform(shape[:1]).double() + (noise.uniform(shape[:1]).double() + 2**-25) * 2**-24
    chi_square = torch.from_numpy(chdtri(nu, uniform.cpu().numpy())).to(normal)
    return normal * (nu / chi_square).sqrt().reshape(-1, *[1] * (len(shape) - 1))


def heaviest_moment(domain: Domain, beta: float) -> float:
    """beta / kappa: the dual data have finite moments below it (arXiv:2510.08929, section 3); inf for barriers with exponential tails."""
    barrier = getattr(domain, "barrier", "regularised")
    kappa = {"regularised": getattr(domain, "kappa", 0.0), "log": 1.0}.get(barrier, 0.0)
    return beta / kappa if kappa > 0 else float("inf")


@register("dual")
@dataclass
class Dual(Space):
    """Coordinates z = spread (grad Psi(x) - mean) / std, a mirror map of a convex set standardised, where all of R^D is allowed
    (arXiv:2510.08929).

    spread is the prior's own standard deviation, sqrt(nu / (nu - 2)): data narrower than the prior would leave the network a velocity, and
    so errors, in proportion to the wider of the two. Where the prior has none (nu <= 2) it is 1.

    Samples are mapped back once, at the end, and lie strictly inside. A prior lighter than the dual data makes the exact velocity steep
    far out, so that nu should not exceed beta / kappa, beyond which moments of the data are infinite: the default keeps to that.
    """

    domain: Domain | None = option(None, "the convex set and its barrier; null = that of the data set")
    nu: Degrees | None = option(
        None, "degrees of freedom of the Student-t prior; .inf = normal; null = max(2.5, min(10, beta / kappa))", source="arXiv:2510.08929"
    )
    beta: PositiveFloat = option(1.0, "the data have mass ~ delta^beta within delta of the boundary; 1 = a density that is positive there")
    margin: PositiveFloat = option(1e-6, "least slack of the data: what lies nearer to the boundary is moved in", unit="of the slack")
    mean: list[float] | None = option(None, "of the dual data, per coordinate of vectors, one number for images; null = measured")
    std: list[PositiveFloat] | None = option(None, "standard deviation of the dual data, likewise; null = measured")

    def __post_init__(self) -> None:
        self._domain = self.domain
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together; give both, or neither to have them measured")

    @property
    def normal(self) -> bool:
        return self.nu == float("inf")

    @property
    def degrees(self) -> float:
        """Of freedom of the prior."""
        if self.nu is not None:
            return self.nu
        return max(2.5, min(10.0, heaviest_moment(self.set, self.beta)))

    @property
    def spread(self) -> float:
        """Standard deviation of each coordinate, of the prior as of the standardised data."""
        nu = self.degrees
        return (nu / (nu - 2)) ** 0.5 if 2 < nu < float("inf") else 1.0

    @property
    def set(self) -> Domain:
        assert self._domain is not None, "fit the space to its data first"
        return self._domain

    def fit(self, data: Data) -> None:
        self._domain = domain_of(data, self.domain)
        limit = heaviest_moment(self._domain, self.beta)
        if self.degrees > limit:
            log.warning(
                "the prior with nu = %.3g is lighter than the dual data, whose moments are finite below beta / kappa = %.3g only; %s",
                self.degrees,
                limit,
                "set barrier: regularised" if getattr(self._domain, "barrier", "") == "log" else "lower kappa, or set nu to at most that",
            )
        if self.mean is None:
            x = first_items(data, _MEASURED).double()
            try:
                inside = self._domain.interior(x, self.margin)
            except ValueError as error:
                raise ConfigError(f"{error}; lower it", key="path.space.margin") from error
            z = self._domain.to_dual(inside)
            z = z.flatten()[:, None] if z.ndim > 2 else z
            deviation = z.std(0)
            # rounded, so that machines that add up in another order agree on the configuration
            self.mean = [float(f"{value:.5g}") for value in z.mean(0)]
            self.std = [float(f"{value:.5g}") for value in deviation.where(deviation > 0, 1.0)]

        numbers = data.shape[0] if len(data.shape) == 1 else 1
        if {len(self.mean or []), len(self.std or [])} - {1, numbers}:
            raise ValueError(f"mean and std have {numbers} numbers for samples of shape {data.shape}; give these, or leave both out")

    def check(self, data: Data) -> None:
        require_held(self.set, data)

    def encode(self, x: Tensor) -> Tensor:
        z = self.set.to_dual(self.set.interior(x, self.margin))
        return z if self.mean is None else (z - z.new_tensor(self.mean)) * self._scale(z)

    def decode(self, z: Tensor) -> Tensor:
        """Raises FloatingPointError where z is not finite: not from the map, but from the network or its guidance."""
        if wrong := int((~z.isfinite().flatten(1).all(1)).sum()):
            raise FloatingPointError(
                f"{wrong} of {len(z)} samples came out as NaN or infinity before they were mapped back; take more steps or less guidance, "
                "or a run that has not diverged"
            )
        return self.set.to_primal(z if self.mean is None else z / self._scale(z) + z.new_tensor(self.mean))[0]

    def _scale(self, z: Tensor) -> Tensor:
        return self.spread / z.new_tensor(self.std)

    def prior(self, noise: Noise, shape: tuple[int, ...]) -> Tensor:
        return student_t(noise, shape, self.degrees)
