"""The simplex of proportions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import pad

from gentrain.config import option, register
from gentrain.domains.base import require_inside
from gentrain.domains.box import KAPPA_HELP, Kappa
from gentrain.domains.linear import Linear
from gentrain.noise import Noise


@register("simplex")
@dataclass
class Simplex(Linear):
    """{x: every x_i > 0, sum x < 1}: the first dim of dim + 1 proportions; the last is 1 - sum x, which `parts` appends.

    Barriers: regularised, log, entropic (x = softmax of z and a 0, in closed form). The first two are inverted in O(dim) per step.
    """

    dim: PositiveInt = option(2, "free coordinates: the number of proportions less one")
    barrier: Literal["regularised", "log", "entropic"] = option("regularised", "mirror map", source="arXiv:2510.08929, arXiv:2310.01236")
    kappa: Kappa = option(0.1, KAPPA_HELP, source="arXiv:2510.08929, section 5")

    def __post_init__(self) -> None:
        identity = torch.eye(self.dim, dtype=torch.float64)
        A = torch.cat([-identity, torch.ones(1, self.dim, dtype=torch.float64)])
        b = pad(torch.ones(1, dtype=torch.float64), (self.dim, 0))
        self._constrain(A, b, torch.full((self.dim,), 1 / (self.dim + 1), dtype=torch.float64))

    def _held(self) -> str:
        return "all proportions but the last, dim of them"

    def parts(self, x: Tensor) -> Tensor:
        """All proportions: [B, dim] -> [B, dim + 1]."""
        return torch.cat([x, 1 - x.sum(1, keepdim=True)], 1)

    def slack(self, x: Tensor) -> Tensor:
        return self.parts(x)

    def project(self, x: Tensor) -> Tensor:
        """By sorting (Held, Wolfe and Crowder 1974): negative parts become 0; where the sum is still above 1, all lose the same amount."""
        flat = x.double()
        descending = flat.sort(1, descending=True).values
        count = torch.arange(1, self.dim + 1, dtype=flat.dtype, device=x.device)
        excess = (descending.cumsum(1) - 1) / count
        kept = (descending > excess).sum(1, keepdim=True)
        onto_face = (flat - excess.gather(1, kept - 1)).clamp(min=0)
        clamped = flat.clamp(min=0)
        return self.interior(torch.where(clamped.sum(1, keepdim=True) > 1, onto_face, clamped).to(x.dtype))

    def uniform(self, noise: Noise, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        exponential = noise.normal((shape[0], self.dim + 1, 2), torch.float64).square().sum(2)
        return self.interior((exponential / exponential.sum(1, keepdim=True))[:, :-1].to(dtype))

    def to_dual(self, x: Tensor) -> Tensor:
        if self.barrier != "entropic":
            return super().to_dual(x)
        parts = self.parts(x.double())
        require_inside(parts)
        return (parts[:, :-1].log() - parts[:, -1:].log()).to(x.dtype)

    def to_primal(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.barrier != "entropic":
            return super().to_primal(z)
        log_parts = pad(z.double(), (0, 1)).log_softmax(1)
        return self.interior(log_parts[:, :-1].exp().to(z.dtype)), log_parts.to(z.dtype)

    def hessian(self, x: Tensor) -> Tensor:
        if self.barrier != "entropic":
            return super().hessian(x)
        parts = self.parts(x.double())
        return ((1 / parts[:, :-1]).diag_embed() + (1 / parts[:, -1])[:, None, None]).to(x.dtype)

    def from_cube(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Stick-breaking: x_k = u_k prod over j < k of (1 - u_j). u [B, dim] in (0, 1) -> (x [B, dim], log |det dx/du| [B]).

        The uniform law of the simplex corresponds to independent u_k ~ Beta(1, dim - k + 1), k from 1. Order the proportions by falling
        mean, so that no u_k is a quotient of two small numbers.
        """
        log_rest = torch.log1p(-u.double()).cumsum(1)  # log of what is left after part k
        before = pad(log_rest, (1, -1))
        x = u.double() * before.exp()
        return self.interior(x.to(u.dtype)), before.sum(1).to(u.dtype)

    def to_cube(self, x: Tensor) -> Tensor:
        """Inverse of `from_cube`: u_k = x_k / (1 - sum over j < k of x_j), strictly inside (0, 1). Raises ValueError as `to_dual` does."""
        parts = self.parts(x.double())
        require_inside(parts)
        rest = parts.flip(1).cumsum(1).flip(1)[:, :-1]  # summed from the small end: 1 minus a sum would lose the digits of a small rest
        info = torch.finfo(x.dtype)
        return (parts[:, :-1] / rest).to(x.dtype).clamp(info.tiny, 1 - info.eps / 2)

    def _solve(self, diagonal: Tensor, right: Tensor) -> Tensor:
        """A A^T is the identity bordered by -1 and dim: eliminated exactly, the Schur complement written without a subtraction."""
        facets, last = diagonal[:, :-1], diagonal[:, -1:]
        inverse = 1 / (1 + facets)
        schur = last + (facets * inverse).sum(1, keepdim=True)
        final = (right[:, -1:] + (inverse * right[:, :-1]).sum(1, keepdim=True)) / schur
        return torch.cat([inverse * (right[:, :-1] + final), final], 1)
