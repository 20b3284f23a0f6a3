"""`engine: torch`, the reference: a plain module and optimiser, gradients averaged over the ranks while the backward runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from pydantic import PositiveFloat
from torch import Tensor, nn

from gentrain.config import option, register
from gentrain.training.engine import Engine, EngineMisuse, Held, Precision, ReplicatedEngine, RoleEngine, StepResult, replicated
from gentrain.training.optimizers import Optimizer, Partition
from gentrain.training.world import World

_BUCKET = 25 * 2**20  # bytes of gradients that are sent at once: large against the latency, small against the backward they hide behind


class _Average:
    """Averages gradients over the ranks, bucket by bucket, while the backward that makes the last of them still runs.

    Buckets leave in one order on every rank, whatever each rank's graph reaches; what it does not reach counts as zero.
    """

    def __init__(self, parameters: list[nn.Parameter], ranks: int):
        self._ranks = ranks
        self._buckets: list[list[nn.Parameter]] = []
        room = 0
        for p in reversed(parameters):  # about the order in which a backward reaches them
            if p.nbytes > room:
                self._buckets.append([])
                room = _BUCKET
            self._buckets[-1].append(p)
            room -= p.nbytes
            p.register_post_accumulate_grad_hook(self._arrived)
        self._flat = [torch.cat([torch.zeros_like(p).flatten() for p in bucket]) for bucket in self._buckets]
        self._awaited: list[set[nn.Parameter]] | None = None  # per bucket that has not left; None = gradients are still summed here
        self._left: list[dist.Work] = []

    def backward(self, loss: Tensor) -> None:
        """loss.backward(), after which every gradient is the average; they lie in buffers that the next call overwrites."""
        self._awaited, self._left = [set(bucket) for bucket in self._buckets], []
        try:
            loss.backward()
            while self._awaited:
                self._send()
            self._wait_for_other_ranks()
        finally:
            self._awaited = None
        for bucket, flat in zip(self._buckets, self._flat, strict=True):
            flat /= self._ranks
            for p, gradient in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = gradient.view_as(p)

    def _arrived(self, p: nn.Parameter) -> None:
        if self._awaited is None:
            return
        if not any(p in bucket for bucket in self._awaited):
            raise EngineMisuse("a gradient arrived twice in one backward (reentrant checkpointing does that): use_reentrant=False")
        for bucket in self._awaited:
            bucket.discard(p)
        while self._awaited and not self._awaited[0]:
            self._send()

    def _wait_for_other_ranks(self) -> None:
        """A function of its own, for the stacks that the watchdog shows."""
        for work in self._left:
            work.wait()

    def _send(self) -> None:
        assert self._awaited is not None
        self._awaited.pop(0)
        bucket, flat = self._buckets[len(self._left)], self._flat[len(self._left)]
        for p, place in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            place.zero_() if p.grad is None else place.copy_(p.grad.flatten())
            p.grad = None
        self._left.append(dist.all_reduce(flat, async_op=True))


class _TorchRoleEngine(ReplicatedEngine):
    def __init__(self, engine: TorchEngine, role: str, module: nn.Module, optimizer: Optimizer, world: World):
        super().__init__(role, module, optimizer.build(module.parameters()), world, engine.gradient_clipping)
        self._autocast = engine.precision == "bf16"
        self._average = _Average(list(module.parameters()), world.size) if world.size > 1 else None

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self._autocast):
            output: Tensor = self.module(x, *args, **kwargs)
        return output

    _through = _forward

    def _backward(self, loss: Tensor, last: bool) -> None:
        if self._average is not None and last:
            self._average.backward(loss)
            return
        loss.backward()
        for p in self.module.parameters() if last else ():
            if p.grad is None:  # not reached: ZeRO steps the whole partition
                p.grad = torch.zeros_like(p)

    def _step(self) -> StepResult:
        result = self.clip()
        if result.applied:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return result


@register("torch")
@dataclass
class TorchEngine(Engine):
    """The reference: a plain module and optimiser, gradients averaged over ranks. bf16 is autocast on float32 weights."""

    precision: Precision = option("fp32", "arithmetic of forward and backward; weights stay float32")
    gradient_clipping: PositiveFloat | None = option(1.0, "largest norm of the gradient over all parameters; null = no clipping")

    @property
    def shows(self) -> frozenset[Partition]:
        return frozenset({"elementwise", "global_scalar", "per_tensor", "matrix"})

    @property
    def live_dtype(self) -> torch.dtype:
        return torch.float32

    def build(self, role: str, module: nn.Module, optimizer: Optimizer, world: World) -> RoleEngine:
        return _TorchRoleEngine(self, role, module, optimizer, world)

    def held(self, parameters: list[nn.Parameter], optimizer: Optimizer, ranks: int, passes: int) -> Held:
        weights, state = replicated(parameters, optimizer)
        if ranks == 1:
            return Held(weights, state, average=weights, buffers=0, gradients=weights, passing=0)
        # Each step leaves its gradients in the buckets; those of the passes before, and of buckets that have not left, lie beside them. In
        # the worst order that is all of them: the middle of a UNet comes last in its parameters, and waits for all before it.
        return Held(weights, state, average=weights, buffers=weights, gradients=0, passing=weights)
