"""Optimisers that look at whole tensors, as pytorch-optimizer ships them. On a flat shard each would silently be another one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn

from gentrain.config import ConfigError, Fraction, option, register
from gentrain.training.optimizers.base import AdamLike, Decay, Optimizer, by_shape, counted, decay_groups


@register("mars")
@dataclass
class MARS(Optimizer):
    """AdamW on gradients corrected by their change (arXiv:2411.10438), MARS-AdamW; vectors and scalars get plain AdamW.

    The corrected gradient of each tensor is clipped to norm 1.
    """

    needs = "matrix"
    lr: PositiveFloat = option(3e-3, "peak learning rate", source="arXiv:2411.10438, section 5")
    beta1: Decay = option(0.95, "decay of the gradient average", unit="per step", source="arXiv:2411.10438, section 5")
    beta2: Decay = option(0.99, "decay of the squared-gradient average", unit="per step", source="arXiv:2411.10438, section 5")
    gamma: NonNegativeFloat = option(0.025, "strength of the correction; 0 = none", source="arXiv:2411.10438, section 5")
    eps: PositiveFloat = option(1e-8, "added to the root of the squared-gradient average")
    weight_decay: NonNegativeFloat = option(0.0, "decoupled; multiplied by the learning rate")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        from pytorch_optimizer import MARS as Library

        groups = [{**group, "weight_decay_1d": group.get("weight_decay", self.weight_decay)} for group in decay_groups(parameters)]
        return counted(Library)(
            groups,
            lr=self.lr,
            lr_1d=self.lr,  # type: ignore[call-arg]
            betas=(self.beta1, self.beta2),
            gamma=self.gamma,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )


@register("adamp")
@dataclass
class AdamP(AdamLike):
    """AdamW without the part of a step along the weights, where these are scale-invariant (arXiv:2006.08217, algorithm 2)."""

    needs = "matrix"
    delta: PositiveFloat = option(
        0.1, "a tensor counts as scale-invariant where the cosine of gradient and weights is below delta / sqrt(size)", source="section 3.3"
    )
    wd_ratio: Fraction = option(0.1, "weight decay of these, relative", source="arXiv:2006.08217, section 4")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        from pytorch_optimizer import AdamP as Library

        own: dict[str, Any] = {"delta": self.delta, "wd_ratio": self.wd_ratio}
        return counted(Library)(decay_groups(parameters), **self.rule(), **own)


@register("sgdp")
@dataclass
class SGDP(Optimizer):
    """SGD without the part of a step along the weights, where these are scale-invariant (arXiv:2006.08217, algorithm 1)."""

    needs = "matrix"
    lr: PositiveFloat = option(1e-2, "peak learning rate")
    momentum: Decay = option(0.9, "decay of the velocity", unit="per step")
    delta: PositiveFloat = option(
        0.1, "a tensor counts as scale-invariant where the cosine of gradient and weights is below delta / sqrt(size)", source="section 3.3"
    )
    wd_ratio: Fraction = option(0.1, "weight decay of these, relative", source="arXiv:2006.08217, section 4")
    weight_decay: NonNegativeFloat = option(0.0, "decoupled; multiplied by the learning rate / (1 - momentum)")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        from pytorch_optimizer import SGDP as Library

        return counted(Library)(
            decay_groups(parameters),
            lr=self.lr,
            momentum=self.momentum,  # type: ignore[call-arg]
            delta=self.delta,
            wd_ratio=self.wd_ratio,
            weight_decay=self.weight_decay,
        )


@register("sgd_sai")
@dataclass
class SGDSaI(Optimizer):
    """SGD with momentum whose step of each tensor is scaled once, by the signal-to-noise ratio of its first gradient (arXiv:2412.11768)."""

    needs = "per_tensor"
    lr: PositiveFloat = option(1e-2, "peak learning rate")
    momentum: Decay = option(0.9, "decay of the velocity", unit="per step")
    eps: PositiveFloat = option(1e-8, "added to the gradient's standard deviation")
    weight_decay: NonNegativeFloat = option(0.0, "decoupled; multiplied by the learning rate")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        from pytorch_optimizer import SGDSaI as Library

        return counted(Library)(
            decay_groups(parameters),
            lr=self.lr,
            momentum=self.momentum,  # type: ignore[call-arg]
            eps=self.eps,
            weight_decay=self.weight_decay,
        )


@register("muon")
@dataclass
class Muon(Optimizer):
    """Orthogonalised momentum for matrices (Jordan et al. 2024; Bernstein and Newhouse, arXiv:2409.20325), AdamW for vectors and scalars.

    Steps are scaled as AdamW's usually are, by 0.2 sqrt(the larger side), so that one learning rate serves both (arXiv:2502.16982, eq. 4).
    Embeddings and the last layer are matrices to it like all others.
    """

    needs = "matrix"
    lr: PositiveFloat = option(1e-3, "peak learning rate, of matrices and of the rest")
    momentum: Decay = option(0.95, "decay of the momentum of matrices, Nesterov's", unit="per step")
    steps: PositiveInt = option(5, "Newton-Schulz iterations")
    beta1: Decay = option(0.9, "AdamW's decay of the gradient average", unit="per step")
    beta2: Decay = option(0.95, "AdamW's decay of the squared-gradient average", unit="per step")
    eps: PositiveFloat = option(1e-8, "AdamW's, added to the root of the squared-gradient average")
    weight_decay: NonNegativeFloat = option(0.0, "decoupled; multiplied by the learning rate")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        from pytorch_optimizer import Muon as Library

        shared = {"lr": self.lr, "weight_decay": self.weight_decay}
        matrices = {"use_muon": True, "momentum": self.momentum, "ns_steps": self.steps, "use_adjusted_lr": True}
        rest = {"use_muon": False, "betas": (self.beta1, self.beta2), "eps": self.eps}
        return counted(Library)(by_shape(parameters, shared | matrices, shared | rest))  # type: ignore[call-arg]


@register("soap")
@dataclass
class SOAP(AdamLike):
    """AdamW along the eigenvectors of Shampoo's statistics, of each side of a tensor (arXiv:2409.11321); vectors and scalars get AdamW.

    Beside AdamW's two states it keeps two matrices of each side, squares of its length. The first step only begins the statistics.
    """

    needs = "matrix"
    lr: PositiveFloat = option(3e-3, "peak learning rate", source="arXiv:2409.11321, section 5")
    beta1: Decay = option(0.95, "decay of the gradient average", unit="per step", source="arXiv:2409.11321, section 5")
    beta2: Decay = option(
        0.95, "decay of the squared-gradient average and of the statistics", unit="per step", source="arXiv:2409.11321, section 5"
    )
    every: PositiveInt = option(10, "between updates of the eigenvectors", unit="optimiser steps", source="arXiv:2409.11321, section 5")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        from pytorch_optimizer import SOAP as Library

        rule = self.rule() | {"precondition_frequency": self.every}
        fixed = {"precondition_frequency": self.every, "shampoo_beta": self.beta2}

        class Kept(counted(Library)):  # type: ignore[misc]
            """What the library holds in lists, one entry per side, lies in the state as tensors: checkpoints hold these.

            In one order of their numbers, too: products round otherwise in another.
            """

            def step(self, closure: Callable[[], float] | None = None) -> None:
                for p, state in self.state.items():
                    sides = {key: [state.pop(f"{key}{side}", []) for side in range(p.ndim)] for key in ("GG", "Q")}
                    state.update(fixed | sides)
                super().step(closure)
                for state in self.state.values():
                    for key in ("GG", "Q"):
                        each = enumerate(state.pop(key))
                        state.update({f"{key}{side}": matrix.contiguous() for side, matrix in each if len(matrix)})
                    for key in fixed:
                        del state[key]

        return Kept(decay_groups(parameters), **rule)

    def state_bytes(self, shape: tuple[int, ...]) -> tuple[float, int]:
        sides = sum(side**2 for side in shape if side <= 10_000) if len(shape) > 1 else 0  # longer ones have none, the library's limit
        return 8.0, 8 + 2 * 4 * sides


@register("fira")
@dataclass
class Fira(AdamLike):
    """AdamW along the `rank` largest directions of a matrix's gradient, and the rest of that scaled as it was (arXiv:2410.01623).

    The moments have `rank` rows or columns. Vectors, scalars and the kernels of convolutions get AdamW.
    """

    needs = "matrix"
    eps: PositiveFloat = option(1e-6, "added to the root of the squared-gradient average", source="arXiv:2410.01623, code release")
    rank: PositiveInt = option(128, "directions of each matrix", source="arXiv:2410.01623, table 2: a quarter of the width")
    every: PositiveInt = option(
        200, "between computations of the directions", unit="optimiser steps", source="arXiv:2410.01623, section 5.1"
    )

    def check(self, parameters: list[nn.Parameter]) -> None:
        if not any(p.ndim == 2 and min(p.shape) > self.rank for p in parameters):
            widest = max((min(p.shape) for p in parameters if p.ndim == 2), default=0)
            remedy = f"set it to less than {widest}" if widest > 1 else "take adamw"
            raise ConfigError(f"no matrix has more directions than that, so that fira would be adamw; {remedy}", key="optimizer.rank")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        from pytorch_optimizer import Fira as Library
        from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector

        # Of scale 1: the library would scale what it takes off the gradient, too.
        low = {"rank": self.rank, "update_proj_gap": self.every, "scale": 1.0, "projection_type": "std"}

        class Kept(counted(Library)):  # type: ignore[misc]
            """The directions lie in the state as a tensor: checkpoints hold that."""

            def step(self, closure: Callable[[], float] | None = None) -> None:
                for state in self.state.values():
                    if "directions" in state:
                        state["projector"] = GaLoreProjector(**low)
                        state["projector"].ortho_matrix = state.pop("directions")
                super().step(closure)
                for state in self.state.values():
                    if "projector" in state:
                        state["directions"] = state.pop("projector").ortho_matrix.contiguous()

        return Kept([{**group, **low} for group in decay_groups(parameters)], **self.rule())

    def state_bytes(self, shape: tuple[int, ...]) -> tuple[float, int]:
        if len(shape) != 2:
            return 8.0, 8
        short, long = sorted(shape)
        return 0.0, 4 * min(self.rank, short) * (2 * long + short) + 12


@register("subset_norm")
@dataclass
class SubsetNorm(AdamLike):
    """AdamW with one second moment for each run of about sqrt(size) weights of a matrix: their squares' sum (arXiv:2411.07120).

    Vectors and scalars get AdamW.
    """

    needs = "matrix"
    lr: PositiveFloat = option(1e-3, "peak learning rate; steps of matrices are as much shorter as the root of such a run's length")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        from pytorch_optimizer import AdamWSN as Library

        class Kept(counted(Library)):  # type: ignore[misc]
            """Lengths come from a checkpoint as tensors, and are whole numbers here."""

            def step(self, closure: Callable[[], float] | None = None) -> None:
                for state in self.state.values():
                    if "subset_size" in state:
                        state["subset_size"] = int(state["subset_size"])
                super().step(closure)

        return Kept(by_shape(parameters, {"sn": True}, {"sn": False}), **self.rule())

    def state_bytes(self, shape: tuple[int, ...]) -> tuple[float, int]:
        if len(shape) < 2:
            return 8.0, 8
        size = math.prod(shape)
        return 4.0, 4 * size // next(run for run in range(math.isqrt(size), 0, -1) if size % run == 0) + 8


@register("ranger21")
@dataclass
class Ranger21(AdamLike):
    """AdamW with positive-negative momentum, lookahead every 5 steps, centred gradients, clipping by tensor and a norm loss, which pulls
    every tensor to norm 1 (arXiv:2106.13731). Of its own schedule nothing is used: `warmup_stable_decay` is about that.
    """

    needs = "matrix"
    weight_decay: NonNegativeFloat = option(
        1e-4, "decoupled; multiplied by the learning rate over the root of the mean second moment", source="arXiv:2106.13731, section 3"
    )

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        from pytorch_optimizer import Ranger21 as Library

        class Kept(counted(Library)):  # type: ignore[misc]
            """The library counts the steps of lookahead beside its state."""

            def step(self, closure: Callable[[], float] | None = None) -> None:
                steps = next((int(state["step"]) for state in self.state.values()), 0)
                self.lookahead_step = steps % self.lookahead_merge_time
                super().step(closure)

        return Kept(decay_groups(parameters), num_iterations=1, disable_lr_scheduler=True, **self.rule())
