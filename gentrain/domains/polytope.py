"""Bounded polytopes, with equality constraints if need be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.domains.base import Matrix, OnDevice, Vector, as_matrices, read_tensors
from gentrain.domains.box import KAPPA_HELP, Kappa
from gentrain.domains.linear import Linear
from gentrain.noise import Noise

_ROUNDS = 20  # after 5 the longest directions of a stretched 24-dimensional set are still short
_THINNEST = 1e-9  # a polytope whose largest ball is smaller, relative to |b|, has no interior that floats could represent


@register("polytope")
@dataclass
class Polytope(Linear):
    """{x: A x < b, C x = d}, bounded, with an interior relative to C x = d.

    With equality constraints the samples of all functions are coordinates y [B, D] in an orthonormal basis of the null space of C, so that
    no rounding can break an equality: x = x0 + N y (`to_full`), y = N^T (x - x0) (`to_coordinates`), x0 the solution of least norm, D the
    number of columns of N. N is the Gram-Schmidt basis of the unit vectors e_1, e_2, ... projected onto the null space, dependent ones left
    out: the same on every machine. Without C, y is x. Slacks are b - A x whichever coordinates are used.

    Raises ValueError, naming the remedy, for a polytope that is empty, without interior, or unbounded.
    """

    A: Matrix = option(help="rows of A x < b, or a safetensors file that holds A, b and, where there are equalities, C and d")
    b: Vector | None = option(None, "right-hand sides of A; null = in the file")
    C: Matrix | None = option(None, "rows of C x = d; null = none, or in the file of A")
    d: Vector | None = option(None, "right-hand sides of C")
    barrier: Literal["regularised", "log"] = option("regularised", "mirror map", source="arXiv:2510.08929")
    kappa: Kappa = option(0.1, KAPPA_HELP, source="arXiv:2510.08929, section 5")
    walk: PositiveInt | None = option(None, "steps of hit-and-run to a uniform point; null = 50 + D^2 / 2", unit="steps")

    def __post_init__(self) -> None:
        A, b, C, d = self._read()
        offset, basis = _null_space(C, d, A.shape[1])
        A, b = A @ basis, b - A @ offset
        centre, metric = _analytic_centre(A, b, _largest_ball(A, b))
        self._constrain(A, b, centre)
        self._chart, self._metric = OnDevice(offset, basis), metric

    def _read(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = {name: getattr(self, name) for name in "AbCd" if getattr(self, name) is not None}
        if isinstance(self.A, str):
            values |= read_tensors(self.A, "AbCd", "A")
        if "b" not in values:
            raise ConfigError("polytope needs the right-hand sides of A; give b, or a file that holds them", key="b")
        tensors = as_matrices(values)
        A, b = tensors["A"], tensors["b"]
        C, d = tensors.get("C", A.new_zeros(0, A.shape[-1])), tensors.get("d", A.new_zeros(0))
        if A.ndim != 2 or C.ndim != 2 or A.shape[1] != C.shape[1] or b.shape != A.shape[:1] or d.shape != C.shape[:1]:
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
            raise ValueError(f"A [m, n] goes with b [m], C [k, n] with d [k]; got {shapes}")
        if zero := (A == 0).all(1).nonzero()[:, 0].tolist():
            raise ConfigError(f"rows {zero[:10]} are zero and constrain nothing; remove them", key="A")
        return A, b, C, d

    def _held(self) -> str:
        offset, basis = self._chart(torch.empty(0))
        free = len(offset) == basis.shape[1]
        return super()._held() if free else f"Polytope.to_coordinates of the {len(offset)} variables, what the equalities leave free"

    def to_full(self, y: Tensor) -> Tensor:
        """Coordinates [B, D] -> the variables of A and C, [B, n], in float64."""
        offset, basis = self._chart(y)
        return y.double() @ basis.T + offset

    def to_coordinates(self, x: Tensor) -> Tensor:
        """The variables of A and C [B, n] -> coordinates [B, D], in x's dtype; what violates C x = d is projected away."""
        offset, basis = self._chart(x)
        return ((x.double() - offset) @ basis).to(x.dtype)

    def uniform(self, noise: Noise, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        mean, spread = self._shape(noise.rows)
        x = self._walk(mean.expand(shape), spread, self.walk or 50 + self.dim**2 // 2, noise)
        return self.interior(x.to(dtype))

    @cached_property
    def _shape(self) -> OnDevice:
        """Mean [D] and a root L of the covariance L^T L, roughly: hit-and-run needs far fewer steps with directions of that law.

        Found by hit-and-run itself, whose first directions are those of the log barrier at the centre.
        """
        noise = Noise(0, torch.arange(10 * self.dim + 100))
        x = self._constants(noise.rows)[2].expand(len(noise), -1)
        spread = torch.linalg.inv(torch.linalg.cholesky(self._metric))
        for _ in range(_ROUNDS):
            x = self._walk(x, spread, 20 + 2 * self.dim, noise)
            spread = torch.linalg.cholesky(torch.cov(x.T).reshape(self.dim, self.dim)).T
        return OnDevice(x.mean(0), spread)

    def _walk(self, x: Tensor, spread: Tensor, steps: int, noise: Noise) -> Tensor:
        """Hit-and-run (Smith 1984) from x [B, D]: each step goes to a uniform point of a chord."""
        A, b, _, _ = self._constants(x)
        for _ in range(steps):
            way = noise.normal(tuple(x.shape), torch.float64) @ spread
            rate = way @ A.T
            reach = (b - x @ A.T).clamp(min=0) / rate
            ahead = torch.where(rate > 0, reach, torch.inf).amin(1)
            behind = torch.where(rate < 0, reach, -torch.inf).amax(1)
            x = x + (behind + (ahead - behind) * noise.uniform((len(x),)))[:, None] * way
        return x


def _null_space(C: Tensor, d: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(x0 [n], N [n, D]) with {x0 + N y} = {x: C x = d}. Raises ValueError where there is no solution or only one."""
    if not len(C):
        return torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)
    inverse = torch.linalg.pinv(C, rtol=1e-10)
    offset = inverse @ d
    if float((C @ offset - d).abs().max()) > 1e-8 * (1 + float(d.abs().max())):
        raise ValueError("C x = d has no solution; remove the equalities that contradict each other")
    columns: list[Tensor] = []
    for column in (torch.eye(dim, dtype=torch.float64) - inverse @ C).T:
        for _ in range(2):  # twice is enough: rounding of the first pass is removed by the second
            for other in columns:
                column = column - (other @ column) * other
        if float(column.norm()) > 1e-6:
            columns.append(column / column.norm())
    if not columns:
        raise ValueError("C x = d leaves a single point; remove equalities")
    return offset, torch.stack(columns, 1)


def _analytic_centre(A: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(the maximiser of sum log(b - A x), minus the second derivatives there), by damped Newton steps from x inside."""
    for _ in range(200):
        scaled = A / (b - A @ x)[:, None]
        gradient, metric = scaled.sum(0), scaled.T @ scaled
        step = torch.linalg.solve(metric, gradient)
        decrement = float((gradient @ step).clamp(min=0).sqrt())
        if decrement < 1e-10:
            break
        x = x - step / (1 + decrement if decrement > 0.25 else 1)
    return x, metric


def _largest_ball(A: Tensor, b: Tensor) -> Tensor:
    """Centre of the largest ball in {x: A x < b} (Chebyshev's). Raises ValueError for an empty, flat or unbounded set."""
    from scipy.optimize import linprog

    facets, dim = A.shape
    # bounded if and only if A^T m = 0 for some m > 0 and A has full column rank
    goal = [0.0] * facets + [-1.0]
    least = torch.cat([-torch.eye(facets, dtype=torch.float64), torch.ones(facets, 1, dtype=torch.float64)], 1)
    balance = torch.cat([A.T, torch.zeros(dim, 1, dtype=torch.float64)], 1)
    spread = linprog(goal, least, torch.zeros(facets), balance, torch.zeros(dim), [(0, 1)] * (facets + 1))
    if not spread.success or spread.x[-1] < 1e-12 or int(torch.linalg.matrix_rank(A)) < dim:
        raise ValueError("the polytope is unbounded; add constraints to A and b")
    norms = A.norm(dim=1, keepdim=True)
    result = linprog([0.0] * dim + [-1.0], torch.cat([A, norms], 1), b, bounds=[(None, None)] * dim + [(0, None)])
    if not result.success:
        raise ValueError("no point satisfies all constraints of the polytope; raise b, or remove those that contradict others")
    centre, radius = torch.from_numpy(result.x[:-1].copy()), float(result.x[-1])
    tight = (b - A @ centre <= _THINNEST * (1 + b.abs())).nonzero()[:, 0].tolist()
    if radius <= _THINNEST * (1 + float(b.abs().max())) or tight:
        raise ValueError(
            f"the polytope has no interior: among rows {tight[:10]} of A are equalities in disguise; give them as C, d instead"
        )
    return centre
