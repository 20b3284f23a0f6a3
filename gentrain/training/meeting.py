"""Where the ranks of a run meet before they form a process group, so that those that do not come can be named."""

from __future__ import annotations

import itertools
import os
import socket
from datetime import timedelta

import torch.distributed as dist

HOSTS = "GENTRAIN_HOSTS"  # of all ranks in their order, with commas between: set where the launcher knows them
_meetings = itertools.count()  # the stages of a recipe meet one after the other, perhaps in the same store
_stores: dict[tuple[str, int], dist.TCPStore] = {}


class RanksMissing(RuntimeError):
    """Not all ranks of the run have come, or rank 0 cannot be reached; the message names them and their hosts."""


def meet(rank: int, size: int, limit_s: float) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT, once all ranks have written into it. Raises RanksMissing after `limit_s`."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    ours = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun offers its own
    limit = timedelta(seconds=limit_s)
    try:
        store = dist.PrefixStore(
            f"gentrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_meetings)}", _store(address, port, ours, limit)
        )
        store.set(f"rank/{rank}", socket.gethostname())
    except (RuntimeError, OSError) as error:
        raise RanksMissing(
            f"rank {rank} on {socket.gethostname()} cannot meet the others at {address}:{port} within {limit_s:g} s "
            f"(cluster.network.start_limit_s): {_brief(error)}. Look whether rank 0 runs, and whether this host reaches that port"
        ) from error
    try:
        store.wait([f"rank/{each}" for each in range(size)], limit)
    except RuntimeError as error:
        raise RanksMissing(_absent(store, rank, size, limit_s)) from error
    return store


def _store(address: str, port: int, ours: bool, limit: timedelta) -> dist.Store:
    """One for as long as the process lives: closed after a stage, it might still take the others' words about the next one with it."""
    if (address, port) not in _stores:
        listener = None
        if ours and address in ("127.0.0.1", "localhost"):  # by itself the store would listen on every interface of the machine
            with socket.socket() as bound:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                bound.bind(("127.0.0.1", port))
                listener = bound.detach()  # the store closes it
        _stores[address, port] = dist.TCPStore(
            address, port, is_master=ours, timeout=limit, wait_for_workers=False, master_listen_fd=listener
        )
    _stores[address, port].set_timeout(limit)
    return _stores[address, port]


def _absent(store: dist.Store, rank: int, size: int, limit_s: float) -> str:
    try:
        here = {each: store.get(f"rank/{each}").decode() for each in range(size) if store.check([f"rank/{each}"])}
    except RuntimeError:  # rank 0, which holds the store, has told it and ended
        return f"rank {rank} on {socket.gethostname()} has lost rank 0 while not all {size} ranks were there; its message names them"
    missing = [each for each in range(size) if each not in here]
    hosts = os.environ.get(HOSTS, "").split(",")
    each_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    named = [f"rank {each} ({hosts[each] if len(hosts) == size else f'node {each // each_node}'})" for each in missing]
    there = [f"rank {each} on {host}" for each, host in here.items()]
    return (
        f"{len(missing)} of {size} ranks have not come within {limit_s:g} s (cluster.network.start_limit_s): {', '.join(named)}; "
        f"here are {', '.join(there)}. Look at what the missing ones wrote, and whether their hosts reach "
        f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    )


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
