"""What polytopes share: linear constraints A x < b on vectors, the centre, rays, and the inverse mirror map by Newton's method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gentrain.domains.base import Domain, OnDevice, require_converged, require_inside
from gentrain.domains.rays import follow

_MOST_STEPS = 100  # 5 to 30 are taken


class Linear(Domain):
    """{x: A x < b} for vectors [B, D], bounded. Subclasses set `barrier` and `kappa` and call `_constrain`."""

    barrier: Literal["regularised", "log", "entropic"]
    kappa: float

    def _constrain(self, A: Tensor, b: Tensor, centre: Tensor) -> None:
        """A [constraints, D], b [constraints], centre [D], a point well inside; float64."""
        self._constants = OnDevice(A, b, centre, A @ A.T)
        self.dim = A.shape[1]

    def check_shape(self, shape: Sequence[int]) -> None:
        if tuple(shape) != (self.dim,):
            raise ValueError(
                f"{self.registered_name} is for vectors ({self.dim},), got samples of shape {tuple(shape)}; they hold {self._held()}"
            )

    def _held(self) -> str:
        """What the numbers of a sample are, for messages."""
        return "a number for each column of A"

    def slack(self, x: Tensor) -> Tensor:
        A, b, _, _ = self._constants(x)
        return b.to(x.dtype) - x @ A.to(x.dtype).T

    def interior(self, x: Tensor, margin: float = 0.0) -> Tensor:
        A, b, centre, _ = self._constants(x)
        room = b - A @ centre
        if not bool((room > margin).all()):
            raise ValueError(f"no slack of {margin} everywhere: the centre itself is only {float(room.min()):.3g} away from a constraint")
        info = torch.finfo(x.dtype)
        on = x.double()
        for rounded in (0, self.dim / 2 + 4):  # first onto the set, so that the second bound is that of a point of the set
            rounding = rounded * info.eps * (b.abs() + on.abs() @ A.abs().T) + info.tiny
            slack = b - on @ A.T
            missing = (margin + rounding - slack) / (room - slack)
            pull = torch.where(slack < margin + rounding, missing, 0).amax(1, keepdim=True)
            on = torch.where(pull > 0, on + pull * (centre - on), on)
        return on.to(x.dtype)

    def project(self, x: Tensor) -> Tensor:
        """The nearest point, to 1e-9 of the size of the set, then `interior`."""
        outside = (~self.contains(x)).nonzero()[:, 0]
        if not len(outside):
            return self.interior(x)
        near = self._minimise(x[outside].double(), None)[0]
        return self.interior(x.index_copy(0, outside, near.to(x.dtype)))

    def reflect_with_velocity(self, x: Tensor, velocity: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        A, b, centre, _ = self._constants(x)
        normals = A / A.norm(dim=1, keepdim=True)

        def first_hit(position: Tensor, way: Tensor) -> tuple[Tensor, Tensor]:
            rate = way @ A.T
            part = torch.where(rate > 0, (b - position @ A.T).clamp(min=0) / rate, torch.inf)
            first = part.min(1)
            return first.values, normals[first.indices]

        origin = centre.expand_as(x) if start is None else start.double()
        end, turned, bouncing = follow(first_hit, origin, x.double(), velocity.double())
        end = end.to(x.dtype)
        inside = self.interior(end)
        if bool(bouncing.any()):
            inside = torch.where(bouncing[:, None], self.project(end), inside)
        return inside, turned.to(velocity.dtype)

    def to_dual(self, x: Tensor) -> Tensor:
        A, _, _, _ = self._constants(x)
        slack = self.slack(x.double())
        require_inside(slack)
        return (x + slack.pow(-self._exponent) @ A).to(x.dtype)

    def to_primal(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, multipliers = self._minimise(z.double(), self._exponent)
        return self.interior(x.to(z.dtype)), (-multipliers.log() / self._exponent).to(z.dtype)

    def hessian(self, x: Tensor) -> Tensor:
        A, _, _, _ = self._constants(x)
        kappa = self._exponent
        weights = kappa * self.slack(x.double()).pow(-kappa - 1)
        return (torch.eye(self.dim, dtype=A.dtype, device=A.device) + A.T @ (weights[:, :, None] * A)).to(x.dtype)

    @property
    def _exponent(self) -> float:
        return 1.0 if self.barrier == "log" else self.kappa

    def _minimise(self, z: Tensor, kappa: float | None) -> tuple[Tensor, Tensor]:
        """The minimiser x of |x - z|^2 / 2 + barrier(x), z [B, D] float64, and its multipliers m = slack^-kappa; kappa None: no barrier.

        A primal-dual interior point method: unknown are the slacks s > 0, x = z - A^T m holds throughout, and Newton's steps drive
        b - A x - s to 0. Some steps of the barrier alone would be tiny, as s^-kappa hardly grows where the point has yet to come close to a
        facet; a logarithmic barrier helps, whose multipliers p (m = p + s^-kappa) shrink and are dropped when they no longer matter. Below
        1e-10 of its value at the centre (more for |z| > 30) a slack follows m = const / s instead of the true power: x cannot tell, steps
        stay few, and the true log slack is that of m.
        """
        A, b, centre, _ = self._constants(z)
        s = (b - A @ centre).expand(len(z), -1)
        size = 1 + z.norm(dim=1, keepdim=True)
        least, floor = (1e-13 * size**2).clamp(1e-10, 1e-6) * s, 0.0 if kappa else 1e-22 * float(s.max()) ** 2
        noise = 4e-16 * (b.abs() + A.norm(dim=1) * size)  # where facets meet in excess, rounding would be taken for a direction
        p, length, moved = size / s, torch.ones_like(size), torch.full_like(size, torch.inf)
        done = torch.zeros_like(size, dtype=torch.bool)

        def barrier(s: Tensor) -> tuple[Tensor, Tensor]:
            if kappa is None:
                return torch.zeros_like(s), torch.ones_like(s)
            return torch.where(s > least, s.pow(-kappa), least.pow(1 - kappa) / s), torch.where(s > least, kappa, 1.0)

        for _ in range(_MOST_STEPS):
            force, power = barrier(s)
            gap = b - (z - (p + force) @ A) @ A.T - s
            solved = (gap.norm(dim=1, keepdim=True) < 1e-10 * size) & (p == 0).all(1, keepdim=True)
            gap = torch.where(gap.abs() < noise, 0, gap)
            caution = ((1 - length) ** 2).clamp(0.01, 0.8)  # after a short step p s shrinks less
            target = (caution * (p * s).mean(1, keepdim=True)).clamp(min=floor)
            stiffness, pull = (p + power * force) / s, target / s - p
            ds = (pull - self._solve(1 / stiffness, pull / stiffness - gap)) / stiffness
            dp = pull - p * ds / s
            shrinks = torch.maximum(-ds / s, torch.where(p > 0, -dp / p, 0)).amax(1, keepdim=True)
            length = 0.99 / shrinks.clamp(min=0.99)
            before, moved = moved, (length * ds / s).abs().amax(1, keepdim=True)
            done = done | (solved & (moved > before / 2))  # where facets meet in excess single slacks never settle, but x has
            length = torch.where(done, 0, length)
            done = done | (moved < 1e-9)  # this step included: convergence is quadratic
            s, p = s + length * ds, p + length * dp
            p = torch.where((p <= 0.01 * (p + barrier(s)[0])).all(1, keepdim=True), 0, p)
            if bool(done.all()):
                break
        force = barrier(s)[0]
        x = z - (p + force) @ A
        error = (b - x @ A.T - s).norm(dim=1) + (0 if kappa is None else (p @ A).norm(dim=1))
        require_converged(error, 1e-9 * size[:, 0])
        return x, p + force

    def _solve(self, diagonal: Tensor, right: Tensor) -> Tensor:
        """(A A^T + diag(diagonal))^-1 right, for each row: [B, constraints]."""
        gram = self._constants(right)[3]
        matrix = gram + (diagonal + 1e-15 * gram.diagonal()).diag_embed()
        return torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky_ex(matrix)[0])[:, :, 0]
