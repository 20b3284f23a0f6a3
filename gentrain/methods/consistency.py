"""What few-step methods share: distances, scalings, the teacher's step, derivatives along a flow, and the flow map f(x_t, t -> s).

A consistency function is f(x_t, t -> 0), the x0 prediction of a denoiser; a flow map ends at any s <= t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from gentrain.config import ConfigError
from gentrain.data.base import Data
from gentrain.methods.base import Method
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser, Prediction
from gentrain.models.inputs import guidance_embedding as guidance_embedding
from gentrain.paths.base import Path, expand
from gentrain.samplers.base import Sampler
from gentrain.samplers.consistency import Consistency
from gentrain.samplers.flow_map import flow_map as flow_map
from gentrain.samplers.flow_map import flow_step as flow_step
from gentrain.samplers.guidance import guided_x0
from gentrain.samplers.lcm import LCM
from gentrain.samplers.lcm import boundary_scalings as boundary_scalings
from gentrain.samplers.lcm import lcm_timesteps as lcm_timesteps

HUBER = 0.00054  # of the root of the number of coordinates (arXiv:2310.14189, section 3.3)
BOUNDED: tuple[Prediction, ...] = ("v", "velocity", "edm")  # with these the x0 prediction at t = 0 is x itself

Derivative = Literal["jvp", "difference"]


class ConsistencyFunction(Method):
    """A method whose generator's x0 prediction becomes f(x_t, t -> 0), at whatever time it is asked."""

    predictions: ClassVar[tuple[Prediction, ...] | None] = BOUNDED

    def own_sampler(self) -> Sampler:
        return Consistency()

    def check_sampler(self, sampler: Sampler) -> None:
        if not isinstance(sampler, Consistency | LCM):
            raise ValueError(
                f"{sampler.registered_name} does not ask a consistency function as it is taught, from a point of the path to the end "
                "of its flow in one call; take consistency or lcm"
            )
        if sampler.guidance != 1 and not hasattr(self, "label_dropout"):
            raise ValueError(
                f"guidance {sampler.guidance:g} asks for the null class, which {self.registered_name} does not teach: what it learns is "
                "method.guidance, the teacher's; set sampler.guidance to 1"
            )


def check_guidance(weight: float, data: Data, key: str = "guidance", without: float = 1) -> None:
    """Raises ConfigError, about the method's key, when there is nothing to guide by; a weight of `without` does not."""
    if weight != without and not data.class_names and not data.captions:
        raise ConfigError(f"the data have neither classes nor captions to guide by; set it to {without:g}", key=key)


def check_step(step: float) -> None:
    """Raises ValueError where a central difference would be one of rounding errors: of order 1e-7 / step."""
    if step < 1e-5:
        raise ValueError(f"step {step:g} is lost in the rounding of float32; set it to 1e-5 or more")


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
    of order step^2 and eps / step. A call of the network after it drops the same units.
    """
    with torch.no_grad(), same_dropout(x):
        if how == "jvp":
            with sdpa_kernel(SDPBackend.MATH), _ForwardMode():
                derivative: Tensor = torch.func.jvp(function, (x, t), (dx, dt))[1]
            return derivative
        with same_dropout(x):
            ahead = function(x + step * dx, t + step * dt)
        return (ahead - function(x - step * dx, t - step * dt)) / (2 * step)


Solver = Literal["ddim", "heun"]


def solver_step(solver: Solver, teacher: Denoiser, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None, weight: float) -> Tensor:
    """From x [B, ...] at times t [B] to s < t along the guided teacher's flow, without gradient: [B, ...].

    ddim: one call (`flow_step`). heun: two, of second order: the mean of the slopes at both ends, eps in sigma / alpha (arXiv:2206.00364,
    algorithm 1; arXiv:2303.01469, section 6) or, on a path that ends in pure noise, the velocity in its own time. A step to clean data,
    where the slope does not exist, is ddim's.
    """
    path = teacher.path
    with torch.no_grad():
        x0 = guided_x0(teacher, x, t, condition, weight)
        there = flow_step(path, x, x0, t, s)
        if solver == "ddim":
            return there
        ends = ((x, x0, t), (there, guided_x0(teacher, there, s, condition, weight), s))
        alpha, sigma = ([expand(of(each), x) for each in (t, s)] for of in (path.alpha, path.sigma))
        noises = [(at - a * clean) / b for (at, clean, _), a, b in zip(ends, alpha, sigma, strict=True)]
        if path.pure_noise:
            slopes = [path.velocity(clean, eps, time) for (_, clean, time), eps in zip(ends, noises, strict=True)]
            moved = x + expand(s - t, x) * (slopes[0] + slopes[1]) / 2
        else:
            ratio = [b / a for a, b in zip(alpha, sigma, strict=True)]
            moved = alpha[1] * (x / alpha[0] + (ratio[1] - ratio[0]) * (noises[0] + noises[1]) / 2)
        moved = moved if path.space.bounds is None else path.space.bounds.reflect(moved, x)
        return torch.where(sigma[1] > 0, moved, there)


def guided_velocity(teacher: Denoiser, x: Tensor, t: Tensor, condition: Condition | None, weight: float) -> Tensor:
    """d x_t / dt of the teacher's flow with guidance: null + weight (conditional - null), [B, ...], without gradient."""
    path = teacher.path
    with torch.no_grad():
        x0 = guided_x0(teacher, x, t, condition, weight)
    eps = (x - expand(path.alpha(t), x) * x0) / expand(path.sigma(t), x)
    return path.velocity(x0, eps, t)
