"""Runs a function on several ranks that talk over loopback, as a test calls for it.

Ranks are forks of one process that has imported what takes seconds, begun by the first call and ended with the tests.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 240
PRELOADED = ["tests.distributed.cases", "deepspeed", "torch._dynamo", "torch.utils.tensorboard"]


def _rank_main(function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], results: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    import numpy as np
    import torch

    from gentrain.training.world import join, leave

    torch.set_num_threads(1)
    np.random.seed()  # forks would draw the same where processes of their own do not
    try:
        world = join(timeout_s=60)
        results.put((world.rank, True, pickle.dumps(function(world, *arguments))))  # by value: tensors must outlive this process
        leave()
    except BaseException:  # reported by the parent
        results.put((int(environment["RANK"]), False, traceback.format_exc()))
        raise


def _next_result(results: Any, processes: list[Any]) -> Any:
    """The next rank's result; a rank that died without one (it could not import the function, say) is not waited for."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            return results.get(timeout=1)
        dead = [process.exitcode for process in processes if process.exitcode]
        if dead and results.empty():
            raise AssertionError(f"a rank ended with status {dead[0]} and without a result; its traceback is above")
    raise AssertionError(f"no result within {TIMEOUT_S} s")


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """function(world, *arguments) on `size` processes; their results in rank order. Raises with the traceback of a rank that failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    results = context.Queue()
    shared = os.environ | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(size):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(target=_rank_main, args=(function, arguments, environment, results))
        process.start()
        processes.append(process)
    try:
        gathered: dict[int, Any] = {}
        for _ in range(size):
            rank, good, value = _next_result(results, processes)
            if not good:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            gathered[rank] = pickle.loads(value)
        for process in processes:
            process.join(TIMEOUT_S)
        return [gathered[rank] for rank in range(size)]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
