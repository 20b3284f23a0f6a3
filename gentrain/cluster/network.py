"""Whether the ranks of a run reach each other quickly: before the first step, the slow ones by name."""

from __future__ import annotations

import logging
import os
import socket
import time

import torch
import torch.distributed as dist
from torch import Tensor

from gentrain.cluster.attempts import note
from gentrain.training.callbacks import Callback
from gentrain.training.loop import Trainer
from gentrain.training.world import RankGroup, World

log = logging.getLogger(__name__)

BYTES = (4, 4 << 20)  # of a short message, where latency counts, and of one where bandwidth does
ROUNDS = 4  # the best of them counts: a pause of one process is not the network's fault. The first one opens connections as well
FACTOR = 3.0  # times the median of the other ranks
FLOOR_S = (0.010, 0.040)  # what is quicker is never slow: the long message at the speed of Gigabit Ethernet
LIMIT_S = (0.050, 0.400)  # what is slower is slow, whatever the others are: 10 MB/s


class Network(Callback):
    """Measures the network between the ranks once, and warns of those that are slow. Hosts' memory over gloo, accelerators by the sum."""

    def __init__(self, trainer: Trainer):
        world = trainer.world
        if world.size == 1:
            return
        seconds = waits(trainer.roles.group)
        total_s = all_reduce_s(world)
        hosts: list[str] = [""] * world.size
        dist.all_gather_object(hosts, socket.gethostname())
        if not world.is_main:
            return
        log.info(
            "network: %d ranks sum %d MiB in %.1f ms; a rank waits for its neighbour's at most %.1f ms",
            world.size, BYTES[1] >> 20, 1000 * total_s, 1000 * float(seconds[:, 1].max()),
        )  # fmt: skip
        slow = slow_ranks(seconds)
        if slow:
            reason = described(seconds, hosts, slow)
            note(trainer.run.directory, "slow network", ranks=slow, hosts=sorted({hosts[rank] for rank in slow}), reason=reason)
            log.warning("slow network: %s", reason)


def waits(group: RankGroup) -> Tensor:
    """[ranks, 2] seconds that the quicker of a rank's two neighbours waited for its short and its long message. Collective.

    Neighbours are on other nodes, if there are any. A rank that is slow, or whose link is, keeps both of them waiting; its neighbours keep
    only itself waiting. Of two ranks a slow link shows on both, a slow rank on itself.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    stride = local if group.size > local and group.size % local == 0 else 1
    mine = torch.full((2, 2), float("inf"))  # from behind and from ahead; short and long
    for column, size in enumerate(BYTES):
        message = torch.zeros(size // 4)
        for _ in range(ROUNDS):
            for side, steps in enumerate((stride, -stride)):
                group.max(0)  # all begin together
                waited = _exchange(message, (group.rank - steps) % group.size, (group.rank + steps) % group.size)
                mine[side, column] = min(float(mine[side, column]), waited)
    of_all = group.gather(mine[None])
    return torch.minimum(of_all[:, 0].roll(-stride, 0), of_all[:, 1].roll(stride, 0))


def _exchange(message: Tensor, source: int, target: int) -> float:
    """Seconds of waiting for a message, from when this rank's own is on its way: a rank does not wait for itself."""
    received = torch.empty_like(message)
    receiving, sending = dist.irecv(received, source), dist.isend(message, target)
    assert receiving is not None and sending is not None
    begun = time.perf_counter()
    receiving.wait()
    waited = time.perf_counter() - begun
    sending.wait()
    return waited


def all_reduce_s(world: World) -> float:
    """Seconds in which all ranks sum the long message where their tensors live, the best of the rounds. Collective."""
    message, best = torch.zeros(BYTES[1] // 4, device=world.device), float("inf")
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        dist.all_reduce(message)
        message[0].item()  # waits for the device
        best = min(best, time.perf_counter() - begun)
    return best


def slow_ranks(seconds: Tensor) -> list[int]:
    """The ranks that are slow by `waits` [ranks, 2]."""
    found = set()
    for column, (floor, limit) in enumerate(zip(FLOOR_S, LIMIT_S)):
        of_all = seconds[:, column]
        for rank, value in enumerate(of_all.tolist()):
            others = torch.cat([of_all[:rank], of_all[rank + 1 :]])
            if value > max(floor, min(limit, FACTOR * float(others.median()))):
                found.add(rank)
    return sorted(found)


def described(seconds: Tensor, hosts: list[str], slow: list[int]) -> str:
    """The slow ranks with their hosts and numbers, the others' median, and what to look at."""
    short, long = (1000 * seconds).T.tolist()
    ranks = [
        f"rank {rank} on {hosts[rank]} ({short[rank]:.1f} ms for {BYTES[0]} bytes, {long[rank]:.1f} ms for {BYTES[1] >> 20} MiB: "
        f"{BYTES[1] / long[rank] / 1000:.0f} MB/s)"
        for rank in slow
    ]
    rest = [long[rank] for rank in range(len(hosts)) if rank not in slow]
    usual = f"; the others' median is {float(torch.tensor(rest).median()):.1f} ms" if rest else ""
    return f"{', '.join(ranks)}{usual}. Look at the load of these hosts and at cluster.network.interface"
