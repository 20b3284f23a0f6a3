"""What a domain is: a convex set whose strict interior generated samples must not leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import InstanceOf
from torch import Tensor

from gentrain.config import Component, ConfigError
from gentrain.noise import Noise

Matrix = str | list[list[float]] | InstanceOf[Tensor]  # a safetensors file, or the numbers themselves
Vector = float | list[float] | InstanceOf[Tensor]


class Domain(Component, kind="domain"):
    """A set {x: slack_i(x) > 0 for every constraint i}, open and convex.

    Samples x are [B, *shape] on any device, float32 or float64; duals z have x's shape and dtype. What is computed inside is float64
    wherever float32 would lose digits. Every function that returns a point returns one that lies strictly inside in the dtype returned:
    `contains` is true of it.

    Mirror maps (`to_dual` is the gradient of a barrier Psi, `to_primal` its inverse), chosen by a field `barrier`:

    | barrier     | Psi                                                | domains                                       |
    |-------------|----------------------------------------------------|-----------------------------------------------|
    | regularised | |x|^2 / 2 - sum_i slack_i^(1 - kappa) / (1 - kappa) | all                                           |
    | log         | |x|^2 / 2 - sum_i log slack_i (kappa -> 1)          | all                                           |
    | entropic    | sum of p log p over the dim + 1 parts p             | simplex                                       |
    | atanh       | dual atanh(2 u - 1), u = (x - low) / (high - low)   | box, orthonormal_slabs                        |

    (arXiv:2510.08929, section 3, for the first; arXiv:2310.01236 for the last two.) With the first two the inverse is 1-Lipschitz. A dual
    has finite moments of order p < beta / kappa where the data have mass delta^beta within delta of the boundary; kappa is 1 for log.

    Attributes:
        folds: `reflect` needs no start: it is the exact folding map (box, orthonormal_slabs).
    """

    folds: ClassVar[bool] = False

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raises ValueError, naming what would do, unless samples of `shape` (without B) can lie in this domain."""
        raise NotImplementedError

    def slack(self, x: Tensor) -> Tensor:
        """-phi_i(x) of every constraint phi_i < 0, in x's dtype: [B, constraints], positive inside.

        box: x - low of each coordinate, then high - x of each; ball: radius^2 - |x|^2; simplex: each x_i, then 1 - sum x; polytope:
        b - A x; orthonormal_slabs: u - low of each row of A, then high - u, where u = A x.
        """
        raise NotImplementedError

    def contains(self, x: Tensor) -> Tensor:
        """[B] bool: every slack is positive, evaluated in x's dtype. False for NaN."""
        return (self.slack(x) > 0).all(1)

    def interior(self, x: Tensor, margin: float = 0.0) -> Tensor:
        """x where it lies well inside; elsewhere a point close by, every slack of which is positive and, but for rounding, >= `margin`.

        Made for points on the boundary or just outside: data with real zeros before `to_dual` (margin 1e-6 or so), results of float
        arithmetic. Each coordinate or slab is clamped (box, slabs); ball, simplex and polytope move the point towards their centre. NaN
        stays NaN, here and in every function but the mirror maps, which raise, and `contains` is false of it.
        Raises ValueError for a margin that no point has.
        """
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """The nearest point, then `interior`: for points from anywhere."""
        raise NotImplementedError

    def reflect(self, x: Tensor, start: Tensor | None = None) -> Tensor:
        """Where a particle ends that moves from `start` (strictly inside; None = the centre) towards x and is mirrored at every wall.

        Exact folding, whatever the start, where `folds`. Elsewhere the ray is followed facet by facet, at most 20 times, and what is still
        outside then is projected.
        """
        return self.reflect_with_velocity(x, torch.zeros_like(x), start)[0]

    def reflect_with_velocity(self, x: Tensor, velocity: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`reflect`, and the velocity [B, *shape] mirrored at the same walls: on a box its sign flips where folds are odd."""
        raise NotImplementedError

    def uniform(self, noise: Noise, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Independent points, uniform in the domain: shape (B, *sample shape), B the rows of `noise`.

        polytope: hit-and-run, so up to what its `walk` steps leave of the start; orthonormal_slabs: uniform between the slabs, standard
        normal in the orthogonal complement, where no uniform law exists.
        """
        raise NotImplementedError

    def to_dual(self, x: Tensor) -> Tensor:
        """The mirror map, gradient of Psi: x -> z, onto all of R^D. Raises ValueError, naming the worst row, where x is not inside."""
        raise NotImplementedError

    def to_primal(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse mirror map: z -> (x, log slack [B, constraints], in the order of `slack`).

        log slack is that of the exact inverse, and right where x had to be moved off the boundary, which rounding would have put it on: a
        slack of e^-200 is no float beside x. Converges to 1e-9 (1 + |z|) in the dual, or raises FloatingPointError naming the worst row.
        Where a polytope has slacks below 1e-10 of its size (1e-6 for |z| > 3000), x is right to that part of its size.
        """
        raise NotImplementedError

    def hessian(self, x: Tensor) -> Tensor:
        """Second derivatives of Psi at x, the Jacobian of `to_dual`: [B, D, D], D = elements of one sample."""
        raise NotImplementedError


class OnDevice:
    """Constant float64 tensors that follow the samples to their device, moved there once."""

    def __init__(self, *tensors: Tensor):
        self._copies = {torch.device("cpu"): tensors}

    def __call__(self, like: Tensor) -> tuple[Tensor, ...]:
        if like.device not in self._copies:
            self._copies[like.device] = tuple(tensor.to(like.device) for tensor in self._copies[torch.device("cpu")])
        return self._copies[like.device]


def as_matrices(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Float64 tensors of lists or tensors. Raises ConfigError, naming the first that is ragged or holds a number that is not finite."""
    tensors = {}
    for name, value in values.items():
        try:
            tensors[name] = torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise ConfigError("its rows differ in length; give each as many numbers", key=name) from error
        if not bool(tensors[name].isfinite().all()):
            raise ConfigError("it holds numbers that are not finite; correct them, or leave out constraints without bound", key=name)
    return tensors


def read_tensors(file: str, names: Sequence[str], key: str) -> dict[str, Tensor]:
    """Float64 tensors from a safetensors file, those of `names` that it holds. Raises ConfigError without a file or the first of them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name).double() for name in names if name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read {file} as a safetensors file of {', '.join(names)}: {error}", key=key) from error
    if names[0] not in tensors:
        raise ConfigError(f"{file} holds no tensor called {names[0]}; it holds {', '.join(tensors) or 'none of those expected'}", key=key)
    return tensors


def require_inside(slack: Tensor) -> None:
    """Raises ValueError unless every slack [B, constraints] is positive."""
    inside = (slack > 0).all(1)
    if not bool(inside.all()):
        row = int(slack.nan_to_num(-torch.inf).amin(1).argmin())
        message = (
            f"{int((~inside).sum())} points are not strictly inside, the worst in row {row} (least slack {float(slack[row].min()):.3g})"
        )
        raise ValueError(f"{message}; move them there with interior(x, margin)")


def require_converged(error: Tensor, limit: Tensor) -> None:
    """Raises FloatingPointError unless error [B] <= limit [B] everywhere; NaN counts as too large."""
    if not bool((error <= limit).all()):
        row = int((error / limit).nan_to_num(torch.inf).argmax())
        raise FloatingPointError(
            f"the inverse mirror map did not converge in row {row}: dual residual {float(error[row]):.3g}, allowed {float(limit[row]):.3g}"
        )
