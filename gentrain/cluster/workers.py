"""How the workers of Ray Train learn who they are and where to meet; they then form their group themselves, as the ranks of torchrun do."""

from __future__ import annotations

import os
import socket
from typing import Any

from gentrain.training.meeting import HOSTS


def introductions() -> Any:
    """A `torch_config` for Ray Train in place of its process group, for whose ranks it waits in silence, and names nobody."""
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class Introductions(Backend):
        share_cuda_visible_devices = True  # as Ray's own does for torch: LOCAL_RANK numbers what a worker sees

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            places = worker_group.execute(_place)
            address, port, _ = places[0]
            worker_group.execute(_introduce, address, port, [host for *_, host in places])

    class Workers(TorchConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return Introductions

    return Workers()


def _place() -> tuple[str, int, str]:
    """Address, a port that is free, and name of the host."""
    import ray

    address = ray.util.get_node_ip_address()
    with socket.create_server((address, 0)) as server:
        return address, server.getsockname()[1], socket.gethostname()


def _introduce(address: str, port: int, hosts: list[str]) -> None:
    import ray.train

    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address, "MASTER_PORT": str(port), HOSTS: ",".join(hosts),
        "RANK": str(context.get_world_rank()), "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()), "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }  # fmt: skip
