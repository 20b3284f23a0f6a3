"""The Ray session of a command: the cluster that RAY_ADDRESS names, else one of our own on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def start() -> None:
    """Connects to Ray, once per process. A session of our own binds to loopback, runs no dashboard and requires Ray's token."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray 2.60 warns at every start otherwise
    import ray

    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, configure_logging=False)


@contextmanager
def session() -> Iterator[None]:
    """Within it parts of gentrain may start Ray; at its end the session is left, so that no process outlives the command."""
    try:
        yield
    finally:
        import sys

        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
