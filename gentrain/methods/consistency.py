"""What few-step methods share: distances, scalings, the teacher's step, derivatives along a flow, and the flow map f(x_t, t -> s).

A consistency function is f(x_t, t -> 0), the x0 prediction of a denoiser; a flow map ends at any s <= t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser, Prediction
from gentrain.models.inputs import guidance_embedding as guidance_embedding
from gentrain.paths.base import Path, expand
from gentrain.samplers.flow_map import flow_map as flow_map
from gentrain.samplers.flow_map import flow_step as flow_step
from gentrain.samplers.guidance import guided_x0
from gentrain.samplers.lcm import boundary_scalings as boundary_scalings
from gentrain.samplers.lcm import lcm_timesteps as lcm_timesteps

HUBER = 0.00054  # of the root of the number of coordinates (arXiv:2310.14189, section 3.3)
BOUNDED: tuple[Prediction, ...] = ("v", "velocity", "edm")  # with these the x0 prediction at t = 0 is x itself

Derivative = Literal["jvp", "difference"]


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """sqrt((a - b)^2 + c^2) - c, elementwise (arXiv:2310.04378, code release): quadratic below c, |a - b| above.

    In float32 at least: in half precision the square of c = 1e-3 vanishes beside that of a difference.
    """
    difference = (a - b).to(torch.promote_types(a.dtype, torch.float32))
    return (difference.square() + c**2).sqrt() - c


def row_huber(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c of each row, c = 0.00054 sqrt(D) (arXiv:2310.14189, eq. 7): [B, ...], [B, ...] -> [B]."""
    difference = (a - b).flatten(1)
    c = HUBER * difference.shape[1] ** 0.5
    return (difference.square().sum(1) + c**2).sqrt() - c


def row_square(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2 of each row, summed over C, H, W: [B, ...], [B, ...] -> [B]."""
    return (a - b).flatten(1).square().sum(1)


# Between a student and a target that has noise of its own only the square has the mean of targets as its optimum. A norm has their
# geometric median: all but the mean in an image's many coordinates, and far from it in one.
Distance = Literal["huber", "l2"]
DISTANCES: dict[Distance, Callable[[Tensor, Tensor], Tensor]] = {"huber": row_huber, "l2": row_square}


def noise_ratio(path: Path, t: Tensor) -> Tensor:
    """sigma / alpha, EDM's noise level of x_t / alpha, at times t of any shape."""
    return (-path.log_snr(t) / 2).exp()


def time_of_ratio(path: Path, ratio: Tensor) -> Tensor:
    """Inverse of `noise_ratio`; 0 and what is beyond the path's ends give the nearer end."""
    return path.time_of_log_snr(-2 * ratio.log())


def doubling_intervals(progress: float, first: int, last: int) -> int:
    """min(first 2^floor(progress (floor(log2(last / first)) + 1)), last): intervals of the grid, doubled in equal parts of training.

    arXiv:2310.14189, eq. 9 (whose N = this + 1 counts grid points); progress in [0, 1].
    """
    doublings = int(progress * ((last // first).bit_length()))
    return min(first * 2**doublings, last)


@contextmanager
def same_dropout(like: Tensor) -> Iterator[None]:
    """What is drawn within it is drawn again after it: two calls of a network then drop the same units."""
    devices = [like.device] if like.device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices):
        yield


class _ForwardMode(TorchFunctionMode):
    """Layers whose forward derivative torch lacks for some layouts: group normalisation wants contiguous input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


def derivative_along(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, how: Derivative, step: float
) -> Tensor:
    """The derivative of function(x, t) along (dx, dt), without gradient: [B, ...], for x, dx [B, ...] and t, dt [B].

    "jvp": exact, forward-mode automatic differentiation in one pass, attention by its plain formula (flash kernels have no forward
    derivative). "difference": central difference over `step` along (dx, dt), two calls and no demands on network or engine; its error is
    of order step^2 and eps / step.
    """
    with torch.no_grad():
        if how == "jvp":
            with sdpa_kernel(SDPBackend.MATH), _ForwardMode():
                derivative: Tensor = torch.func.jvp(function, (x, t), (dx, dt))[1]
            return derivative
        with same_dropout(x):
            ahead = function(x + step * dx, t + step * dt)
        return (ahead - function(x - step * dx, t - step * dt)) / (2 * step)


def guided_velocity(teacher: Denoiser, x: Tensor, t: Tensor, condition: Condition | None, weight: float) -> Tensor:
    """d x_t / dt of the teacher's flow with guidance: null + weight (conditional - null), [B, ...], without gradient."""
    path = teacher.path
    with torch.no_grad():
        x0 = guided_x0(teacher, x, t, condition, weight)
    eps = (x - expand(path.alpha(t), x) * x0) / expand(path.sigma(t), x)
    return path.velocity(x0, eps, t)
