"""The ranks that train together: who we are, how we agree, where tensors live."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from gentrain.config import ConfigError
from gentrain.training.meeting import meet


@dataclass(frozen=True)
class World:
    """This process among those of the run. Made by `join`; reads the variables that Ray Train and torchrun both set."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def placed() -> tuple[int, int]:
    """RANK and WORLD_SIZE of this process; 0 and 1 where no launcher has set them. Raises ConfigError for what none would have set."""
    size = _variable("WORLD_SIZE", 1, 1)
    rank = _variable("RANK", 0, 0, size - 1)
    _variable("LOCAL_RANK", 0, 0)
    _variable("LOCAL_WORLD_SIZE", 1, 1)
    if size > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise ConfigError(f"not set, though WORLD_SIZE is {size}; {_REMEDY}", source="environment", key=name)
        _variable("MASTER_PORT", 0, 1, 65_535)
    return rank, size


_REMEDY = "let torchrun set it, or unset RANK and WORLD_SIZE to train in one process"


def _variable(name: str, otherwise: int, least: int, most: int | None = None) -> int:
    text = os.environ.get(name, str(otherwise))
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        limits = f">= {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"expected a whole number {limits}, got {text!r}; {_REMEDY}", source="environment", key=name)
    return value


def join(timeout_s: float = 1800.0, start_limit_s: float = 300.0) -> World:
    """Joins the process group named by RANK, WORLD_SIZE and MASTER_*; without them the process is a world of its own.

    One process meets itself through a store in memory. What listens is gloo alone, until `leave`.

    Args:
        timeout_s: of a collective. start_limit_s: for all ranks to be there.

    Raises RanksMissing, which names those that have not come; ConfigError as `placed`.
    """
    rank, size = placed()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", _variable("LOCAL_RANK", 0, 0, torch.cuda.device_count() - 1))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            store = meet(rank, size, start_limit_s)
            store.set_timeout(timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, device)


def leave() -> None:
    """Leaves the process group, if one was joined."""
    if not dist.is_initialized():
        return
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()  # it keeps groups of its own, which must not outlive this one
    else:
        dist.destroy_process_group()


class RankGroup:
    """The `nets.group` of methods (see methods.base.Group); the identity on one process.

    Args:
        ranks: those that take part; None = all of the run.
    """

    def __init__(self, size: int, ranks: dist.ProcessGroup | None = None):
        self.size, self._ranks = size, ranks
        self.rank = dist.get_rank(ranks) if size > 1 else 0

    def mean(self, value: Tensor) -> Tensor:
        if self.size == 1:
            return value.detach()
        total = value.detach().clone()
        dist.all_reduce(total, group=self._ranks)
        return total / self.size

    def gather(self, value: Tensor) -> Tensor:
        if self.size == 1:
            return value.detach()
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value.detach().contiguous(), group=self._ranks)
        return torch.cat(parts)

    def shift(self, value: Tensor, steps: int) -> Callable[[], Tensor]:
        steps %= self.size
        if steps == 0:
            return value.detach
        sent, received = value.detach().contiguous(), torch.empty_like(value, memory_format=torch.contiguous_format)
        ahead, behind = (self.rank + steps) % self.size, (self.rank - steps) % self.size
        exchange = [
            dist.P2POp(dist.isend, sent, group=self._ranks, group_peer=ahead),
            dist.P2POp(dist.irecv, received, group=self._ranks, group_peer=behind),
        ]
        works = dist.batch_isend_irecv(exchange)

        def wait(sent: Tensor = sent) -> Tensor:  # holds what is sent until it has left
            for work in works:
                work.wait()
            return received

        return wait

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.max(int(flag)))

    def max(self, value: int) -> int:
        """Of all ranks. Travels between hosts, so that no accelerator has to be waited for."""
        if self.size == 1:
            return value
        largest = torch.tensor([value])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._ranks)
        return int(largest.item())
