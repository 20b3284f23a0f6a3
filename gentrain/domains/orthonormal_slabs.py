"""Slabs between orthonormal directions: a watermark's token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.domains.base import Domain, Matrix, OnDevice, Vector, as_matrices, read_tensors
from gentrain.domains.box import KAPPA_HELP, Box, Kappa
from gentrain.noise import Noise

_ROUNDS = 100  # of the projections to pixels and slabs in turn; images take about five


@register("orthonormal_slabs")
@dataclass
class OrthonormalSlabs(Domain):
    """{x: low < A x < high}, the rows of A orthonormal, for samples of any shape, flattened (arXiv:2310.01236, section 4.2).

    Everything happens to u = A x, as in a box, and leaves the orthogonal complement alone: x + A^T (f(u) - u). O(D) per constraint. What is
    returned keeps every u a little more than rounding away from its bounds, so that `contains` holds however the dot products are summed,
    as long as rounding, 2e-6 |x| in float32, is less than half a slab.

    Samples that will be saved as images are clipped to [-1, 1] and rounded to `levels`, and clipping moves u much further than rounding
    does. With `levels`, what is returned therefore lies in [-1, 1] too, and eight deviations of the rounding away from every bound: found
    by projections to the pixels' range and to the slabs in turn. Where there is no such point, or hardly one, the slabs alone hold.
    """

    folds: ClassVar[bool] = True

    A: Matrix = option(help="orthonormal rows [m, D], or a safetensors file that holds A, low and high")
    low: Vector | None = option(None, "lower bound, of every row or of each; null = in the file")
    high: Vector | None = option(None, "upper bound, of every row or of each; null = in the file")
    barrier: Literal["regularised", "log", "atanh"] = option("regularised", "mirror map", source="arXiv:2510.08929, arXiv:2310.01236")
    kappa: Kappa = option(0.1, KAPPA_HELP, source="arXiv:2510.08929, section 5")
    levels: Annotated[int, Field(ge=2)] | None = option(
        None, "of images in [-1, 1] as they will be saved, such as 256: points keep to that range, and survive rounding; null = no images"
    )

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in ("A", "low", "high") if getattr(self, name) is not None}
        if isinstance(self.A, str):
            values |= read_tensors(self.A, ("A", "low", "high"), "A")
        for name in ("low", "high"):
            if name not in values:
                raise ConfigError("orthonormal_slabs needs both bounds; give them, or a file that holds them", key=name)
        tensors = as_matrices(values)
        A, low, high = (tensors[name] for name in ("A", "low", "high"))
        if A.ndim != 2 or any(bound.ndim and bound.shape != A.shape[:1] for bound in (low, high)):
            raise ValueError(f"A [m, D] goes with bounds [m]; got A {tuple(A.shape)}, low {tuple(low.shape)}, high {tuple(high.shape)}")
        error = float((A @ A.T - torch.eye(len(A), dtype=A.dtype)).abs().max())
        if error > 1e-5:
            raise ValueError(
                f"the rows of A must be orthonormal; A A^T is {error:.1e} off the identity; orthonormalise them (torch.linalg.qr)"
            )
        self._box = Box(low.expand(len(A)), high.expand(len(A)), self.barrier, self.kappa)
        self._constants = OnDevice(A)

    @property
    def rows(self) -> int:
        """m, the number of slabs."""
        return len(self._constants(torch.empty(0))[0])

    def check_shape(self, shape: Sequence[int]) -> None:
        dim = self._constants(torch.empty(0))[0].shape[1]
        if math.prod(shape) != dim:
            raise ValueError(
                f"orthonormal_slabs has rows of {dim} elements, got samples of shape {tuple(shape)}; take a key made for such data"
            )

    def coordinates(self, x: Tensor) -> Tensor:
        """u = A x in x's dtype: [B, *shape] -> [B, m]."""
        return x.flatten(1) @ self._constants(x)[0].to(x.dtype).T

    def slack(self, x: Tensor) -> Tensor:
        return self._box.slack(self.coordinates(x))

    @property
    def room(self) -> float:
        """Distance from the bounds that outlasts rounding to `levels`: 8 deviations, as a unit row adds up independent errors; else 0."""
        return 0.0 if self.levels is None else 8 * 2 / (self.levels - 1) / 12**0.5

    def survives(self, x: Tensor) -> Tensor:
        """Whether x will be inside after it was saved: in [-1, 1], and `room` away from every bound. [B] bool."""
        return (x.flatten(1).abs() <= 1).all(1) & (self.slack(x.double()) > self.room).all(1)

    def interior(self, x: Tensor, margin: float = 0.0) -> Tensor:
        if self.levels is None:
            return self._between(x, margin)
        margin = max(margin, self.room)
        for _ in range(_ROUNDS):
            x = x.clamp(-1, 1)
            done = (self.slack(x.double()) > margin).all(1)
            if bool(done.all()):
                break
            # each row on its own: a sample must not depend on its neighbours
            x = torch.where(done.reshape(-1, *[1] * (x.ndim - 1)), x, self._between(x, 1.25 * margin))
        return x

    def _between(self, x: Tensor, margin: float) -> Tensor:
        """x with every u clamped to its slab less `margin`."""
        u = self.coordinates(x.double())
        low, high = self._box.bounds(x)
        if not bool((2 * margin < high - low).all()):
            raise ValueError(f"no point is {margin} away from both sides of a slab; the narrowest is {float((high - low).min())} wide")
        # of a dot product in x's dtype, A rounded to it: the errors of D products with a unit row add up like a random walk
        rounding = 16 * torch.finfo(x.dtype).eps * (1 + x.double().flatten(1).norm(dim=1, keepdim=True))
        return self.moved(x, u, torch.minimum(torch.maximum(u, low + margin + rounding), high - margin - rounding))

    def project(self, x: Tensor) -> Tensor:
        return self.interior(x)

    def reflect_with_velocity(self, x: Tensor, velocity: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, du = self.coordinates(x.double()), self.coordinates(velocity.double())
        folded, turned = self._box.reflect_with_velocity(u, du)
        return self.interior(self.moved(x, u, folded)), self.moved(velocity, du, turned)

    def uniform(self, noise: Noise, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        x = noise.normal(shape, torch.float64)
        u = self.coordinates(x)
        return self.interior(self.moved(x, u, self._box.uniform(noise, tuple(u.shape), u.dtype)).to(dtype))

    def to_dual(self, x: Tensor) -> Tensor:
        u = self.coordinates(x.double())
        return self.moved(x, u, self._box.to_dual(u))

    def to_primal(self, z: Tensor) -> tuple[Tensor, Tensor]:
        v = self.coordinates(z.double())
        u, log_slack = self._box.to_primal(v)
        return self.interior(self.moved(z, v, u)), log_slack.to(z.dtype)

    def hessian(self, x: Tensor) -> Tensor:
        A = self._constants(x)[0]
        inner = self._box.hessian(self.coordinates(x.double())) - torch.eye(len(A), dtype=A.dtype, device=A.device)
        return (torch.eye(A.shape[1], dtype=A.dtype, device=A.device) + A.T @ inner @ A).to(x.dtype)

    def moved(self, x: Tensor, u: Tensor, to: Tensor) -> Tensor:
        """x with its coordinates u replaced by `to`; x itself where they are the same."""
        change = ((to - u) @ self._constants(x)[0]).reshape(x.shape)
        return torch.where((to == u).all(1).reshape(-1, *[1] * (x.ndim - 1)), x, (x + change).to(x.dtype))
