"""The Ray session of a command: the cluster that RAY_ADDRESS names, else one of our own on this machine."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from gentrain.cluster.stopping import StopRequested, kept
from gentrain.config import ConfigError

log = logging.getLogger(__name__)

_directory: list[str] = []  # where a session of our own writes; at most one
_BEYOND_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # on every system: with "0" all that Ray starts binds to 127.0.0.1
_LAST_WORDS_S = 5.0  # of workers whose session has ended
_RISK = "whoever reaches its ports can run code as you, and read all that it holds"


class ClusterLost(RuntimeError):
    """The Ray cluster cannot be reached, or has lost what it ran for us: another attempt may find it."""


def start() -> None:
    """Connects to Ray, once per process: to the cluster that RAY_ADDRESS names, else to a session of our own.

    A session of our own listens on loopback only, runs no dashboard, and refuses whoever lacks its token, which is made for it and stands
    in the environment of its processes. Where the environment asks for less than that, a warning names the risk.

    Raises ClusterLost when no cluster answers at RAY_ADDRESS.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray 2.60 warns at every start otherwise
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault(_BEYOND_LOOPBACK, "0")  # Ray reads it while it is imported
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # Ray's own file can be read by others
    # Ray's own word on a token ends in how to do without one.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    import ray

    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        try:
            with kept():
                ray.init(log_to_driver=False)
        except ConnectionError as error:
            raise ClusterLost(f"no Ray cluster answers at RAY_ADDRESS = {os.environ['RAY_ADDRESS']}: {error}") from error
        head = ray.get_runtime_context().gcs_address
        if accepts_anybody(head):
            log.warning("the Ray cluster at %s asks for no token: %s. Start it with RAY_AUTH_MODE=token", head, _RISK)
    else:
        prepare()
        with kept():
            ray.init(
                address="local", include_dashboard=False, log_to_driver=False, configure_logging=False, _temp_dir=_directory[0],
                _system_config={"gcs_rpc_server_reconnect_timeout_s": 10},  # a head of our own does not come back: not a minute of waiting
            )  # fmt: skip
        if os.environ["RAY_AUTH_MODE"].lower() != "token":
            log.warning("RAY_AUTH_MODE=%s: %s. Unset it", os.environ["RAY_AUTH_MODE"], _RISK)
        if ray.util.get_node_ip_address() != "127.0.0.1":
            log.warning("Ray listens on every interface of this machine: %s, given its token. Set %s=0", _RISK, _BEYOND_LOOPBACK)


def accepts_anybody(address: str) -> bool:
    """Whether the head of a Ray cluster (host:port) answers a client that has no token."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=5)
        except grpc.RpcError:
            return False
        return True


def end() -> None:
    """Leaves Ray; the processes of a session of our own end, and those that this process has on a cluster."""
    if "ray" not in sys.modules:
        return
    workers = _of_our_own() if _directory else []
    sys.modules["ray"].shutdown()
    for worker in psutil.wait_procs(workers, _LAST_WORDS_S)[1]:  # now and then Ray leaves one behind that it was just starting
        with suppress(psutil.NoSuchProcess):
            worker.kill()


def _of_our_own() -> list[psutil.Process]:
    """What the node of a session of our own has started."""
    workers = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name() == "raylet":
                workers += process.children(recursive=True)
    return workers


def prepare() -> None:
    """Makes the directory of the next session of our own, if there is none yet."""
    if not _directory:
        _directory.append(tempfile.mkdtemp(prefix="gentrain-ray-"))


def tidy(keep: bool) -> None:
    """Deletes what a session of our own has written, or says where it is kept."""
    if _directory and keep and os.listdir(_directory[0]):
        log.warning("Ray's logs are kept in %s", _directory.pop())
    elif _directory:
        directory, tries = Path(_directory.pop()), 0
        while directory.exists() and tries < 50:  # processes that are about to end may still write there
            time.sleep(0.2 if tries else 0)
            shutil.rmtree(directory, ignore_errors=True)
            tries += 1


@contextmanager
def session() -> Iterator[None]:
    """Within it parts of gentrain may start Ray; at its end the session is left, so that no process outlives the command.

    What a session of our own has written is deleted; its logs are kept if the body fails unexpectedly.
    """
    failed = True
    try:
        yield
        failed = False
    except (ConfigError, KeyboardInterrupt, StopRequested):
        failed = False
        raise
    finally:
        end()
        tidy(failed)
