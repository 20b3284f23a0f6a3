"""Calls of a worker shared out over Ray actors: what comes back is the same whatever their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from gentrain.cluster import session
from gentrain.cluster.progress import shown

_RESTARTS = 3  # of an actor, and of a call whose actor died


class Member:
    """A worker in an actor, made as its first call comes: what is wrong with it is raised as what is wrong with a call."""

    def __init__(self, worker: Callable[..., Any], arguments: tuple[Any, ...]):
        torch.set_num_threads(1)
        self._worker, self._make = None, lambda: worker(*arguments)

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        self._worker = self._worker or self._make()
        return getattr(self._worker, method)(*arguments)


def room(resources: Mapping[str, float], actors: int) -> tuple[int, int]:
    """How many of `actors` a cluster of these resources has room for, at least one, and how many GPUs each of them takes."""
    gpus = int(resources.get("GPU", 0))
    return min(actors, max(1, int(resources.get("CPU", 1))), gpus or actors), 1 if gpus else 0  # others would wait for ever


def spread(
    worker: Callable[..., Any], arguments: tuple[Any, ...], method: str, calls: Sequence[tuple[Any, ...]], actors: int, what: str
) -> Iterator[Any]:
    """What `method` of a worker gives for the arguments of each of `calls`, in their order, with a progress bar of `what`.

    Args:
        worker, arguments: what makes a worker, in whatever process; importable, and nothing of it is shared.
        actors: of the fleet, at most one per core of the cluster, or per GPU where there are any; one that dies is made anew, and its call
            repeated. 0 = in this process, without Ray.

    Raises what the worker raises; RuntimeError when an actor dies again and again.
    """
    if not calls:
        return
    if actors == 0:
        alone = worker(*arguments)
        yield from shown((getattr(alone, method)(*call) for call in calls), len(calls), what)
        return
    session.start()
    import ray
    from ray.util import ActorPool

    size, gpus = room(ray.cluster_resources(), min(actors, len(calls)))
    actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=_RESTARTS, max_task_retries=_RESTARTS)(Member)
    fleet = [actor.remote(worker, arguments) for _ in range(size)]
    try:
        done = ActorPool(fleet).map(lambda member, call: member.call.remote(method, call), calls)
        yield from shown(done, len(calls), what)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None
    except ray.exceptions.RayActorError as error:
        raise RuntimeError(f"an actor of the fleet died {_RESTARTS + 1} times; fewer of them leave each more memory: {error}") from None
    finally:
        for member in fleet:
            ray.kill(member)
