"""A ball around the origin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from gentrain.config import option, register
from gentrain.domains.base import Domain, require_converged, require_inside
from gentrain.domains.box import KAPPA_HELP, Kappa
from gentrain.domains.rays import follow
from gentrain.domains.roots import increasing_root
from gentrain.noise import Noise


@register("ball")
@dataclass
class Ball(Domain):
    """{x: |x| < radius}, the norm taken over all of a sample; one constraint, |x|^2 < radius^2.

    Dual: z = x (1 + 2 slack^-kappa). Its inverse keeps the direction and finds |x| = radius tanh(u) as a scalar root: slack =
    (radius / cosh u)^2 then has all its digits at any distance from the boundary.
    """

    radius: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = option(1.0, "of the ball")
    barrier: Literal["regularised", "log"] = option("regularised", "mirror map", source="arXiv:2510.08929")
    kappa: Kappa = option(0.1, KAPPA_HELP, source="arXiv:2510.08929, section 5")

    def check_shape(self, shape: Sequence[int]) -> None:
        """Any shape will do."""

    def slack(self, x: Tensor) -> Tensor:
        return self.radius**2 - x.flatten(1).square().sum(1, keepdim=True)

    def interior(self, x: Tensor, margin: float = 0.0) -> Tensor:
        if margin >= self.radius**2:
            raise ValueError(f"no point has a slack of {margin}; the largest is radius^2 = {self.radius**2}")
        flat = x.flatten(1).double()
        rounding = 2 * (8 + math.log2(flat.shape[1])) * torch.finfo(x.dtype).eps  # of a sum of squares in x's dtype
        largest = math.sqrt(min(self.radius**2 - margin, self.radius**2 * (1 - rounding)))
        norm = flat.norm(dim=1, keepdim=True)
        return torch.where(norm > largest, (flat * (largest / norm)).to(x.dtype), x.flatten(1)).reshape(x.shape)

    def project(self, x: Tensor) -> Tensor:
        return self.interior(x)

    def reflect_with_velocity(self, x: Tensor, velocity: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        flat = x.flatten(1).double()
        origin = torch.zeros_like(flat) if start is None else start.flatten(1).double()
        end, turned, _ = follow(self._first_hit, origin, flat, velocity.flatten(1).double())
        return self.interior(end.to(x.dtype).reshape(x.shape)), turned.to(velocity.dtype).reshape(velocity.shape)

    def _first_hit(self, position: Tensor, way: Tensor) -> tuple[Tensor, Tensor]:
        a, b = way.square().sum(1), (position * way).sum(1)
        c = (position.square().sum(1) - self.radius**2).clamp(max=0)
        root = (b.square() - a * c).sqrt()
        part = torch.where(b > 0, -c / (b + root), (root - b) / a)  # neither subtracts nearly equal numbers
        hit = position + part[:, None] * way
        return torch.where(a > 0, part, torch.inf), hit / hit.norm(dim=1, keepdim=True)

    def uniform(self, noise: Noise, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        direction = noise.normal(shape).flatten(1).double()
        dim = direction.shape[1]
        radius = self.radius * noise.uniform((shape[0], 1)).double() ** (1 / dim)
        return self.interior((direction * (radius / direction.norm(dim=1, keepdim=True))).to(dtype).reshape(shape))

    def to_dual(self, x: Tensor) -> Tensor:
        slack = self.slack(x.double())
        require_inside(slack)
        return (x.flatten(1) * (1 + 2 * slack.pow(-self._exponent))).to(x.dtype).reshape(x.shape)

    def to_primal(self, z: Tensor) -> tuple[Tensor, Tensor]:
        flat = z.flatten(1).double()
        norm = flat.norm(dim=1)
        radius, kappa = self.radius, self._exponent

        def log_slack(u: Tensor) -> Tensor:
            return 2 * (math.log(2 * radius) - u - torch.log1p((-2 * u).exp()))

        def residual(u: Tensor) -> tuple[Tensor, Tensor]:
            weight, tanh = 2 * (-kappa * log_slack(u)).exp(), u.tanh()
            return radius * tanh * (1 + weight) - norm, radius * ((1 - tanh.square()) * (1 + weight) + 2 * kappa * weight * tanh.square())

        furthest = 1 + math.log(2) + ((norm / (1.5 * radius ** (1 - 2 * kappa))).log() / (2 * kappa)).clamp(min=0)  # from tanh(1) > 0.75
        guess = torch.minimum(furthest, norm / (radius + 2 * radius ** (1 - 2 * kappa)))
        u = increasing_root(residual, torch.zeros_like(norm), furthest, guess)
        require_converged(residual(u)[0].abs(), 1e-9 * (1 + norm))
        scale = torch.where(norm > 0, radius * u.tanh() / norm, 0)
        x = (flat * scale[:, None]).to(z.dtype).reshape(z.shape)
        return self.interior(x), log_slack(u)[:, None].to(z.dtype)

    def hessian(self, x: Tensor) -> Tensor:
        flat = x.flatten(1).double()
        slack, kappa = self.slack(flat)[..., None], self._exponent
        identity = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)
        outer = flat[:, :, None] * flat[:, None, :]
        return ((1 + 2 * slack.pow(-kappa)) * identity + 4 * kappa * slack.pow(-kappa - 1) * outer).to(x.dtype)

    @property
    def _exponent(self) -> float:
        return 1.0 if self.barrier == "log" else self.kappa
