"""Who can reach the Ray session of a command: nobody from another machine, and on this one nobody without its token."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import grpc
import psutil
import pytest

from gentrain.cluster import session
from gentrain.cluster.launch import launch
from gentrain.config import Document
from gentrain.training.loop import Outcome
from gentrain.training.run import parse_run

T = TypeVar("T")

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

CANARY = "canary-9be4"
PLUGIN = Path(__file__).parents[1] / "reliability" / "plugin_vault.py"
METHOD = "/ray.rpc.NodeInfoGcsService/GetClusterId"
OPEN = """
import sys
from gentrain.cluster import session
with session.session():
    session.start()
    import ray
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""
JOIN = """
from gentrain.cluster import session
with session.session():
    session.start()
    import ray
    print(ray.get(ray.remote(lambda: 'ran').remote()))
"""
STUCK = """
import os, signal
import psutil
from gentrain.cluster import session
with session.session():
    session.start()
    import ray
    class Actor:
        pid = lambda self: os.getpid()
    actor = ray.remote(Actor).remote()
    print(pid := ray.get(actor.pid.remote()))
    os.kill(pid, signal.SIGSTOP)
    shutdown = ray.shutdown
    ray.shutdown = lambda: (psutil.Process(pid).parent().kill(), shutdown())
"""


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """Address of the head of a session of our own, whose processes know a secret."""
    os.environ["VAULT_TOKEN"] = CANARY
    try:
        with session.session():
            session.start()
            import ray

            yield ray.get_runtime_context().gcs_address
    finally:
        del os.environ["VAULT_TOKEN"]


def _processes(read: Callable[[psutil.Process], T]) -> list[tuple[psutil.Process, T]]:
    """This process and all below it, each with what `read` says of it; one that has ended meanwhile is left out."""
    found = []
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append((process, read(process)))
    return found


def _answer(address: str, token: str | None) -> grpc.StatusCode:
    metadata = [("authorization", f"Bearer {token}")] if token is not None else []
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(METHOD)(b"", timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_everything_listens_on_loopback(head: str) -> None:
    import ray

    ray.get(ray.remote(lambda: None).remote())  # workers listen too
    listening = [
        (process, connection.laddr)
        for process, connections in _processes(lambda process: process.net_connections(kind="inet"))
        for connection in connections
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {process.name() for process, _ in listening} >= {"gcs_server", "raylet"}
    assert {address.ip.removeprefix("::ffff:") for _, address in listening} == {"127.0.0.1"}
    for process, address in listening:
        if any(part.endswith("dashboard.py") for part in process.cmdline()):  # what Ray keeps of it gives its own measurements, no more
            with urllib.request.urlopen(f"http://127.0.0.1:{address.port}/api/version", timeout=10) as page:
                assert page.read().startswith(b"# HELP ray_")


def test_only_the_sessions_token_opens_it(head: str) -> None:
    assert not session.accepts_anybody(head)
    assert _answer(head, None) is grpc.StatusCode.UNAUTHENTICATED
    assert _answer(head, "0" * 64) is grpc.StatusCode.UNAUTHENTICATED
    assert _answer(head, os.environ["RAY_AUTH_TOKEN"]) is grpc.StatusCode.OK


def test_a_client_without_the_token_is_refused(head: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"RAY_ADDRESS": head, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    done = subprocess.run([sys.executable, "-c", JOIN], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "ran" not in done.stdout
    assert "nvalid" in done.stderr and "token" in done.stderr, done.stderr[-2000:]


def test_neither_token_nor_secret_is_in_an_argument_or_a_file(head: str, tmp_path: Path) -> None:
    values = {
        "method": "flow_matching",
        "data": {"name": "vault", "token": "${oc.env:VAULT_TOKEN}", "digest": hashlib.sha256(CANARY.encode()).hexdigest()},
        "model": {"name": "unet", "channels": [8, 8], "attention": []},
        "engine": "torch",
        "training": {"samples": 32, "batch_size": 16, "log_every": 16},
        "cluster": {"place": "ray"},
        "plugins": [str(PLUGIN)],
        "output": str(tmp_path / "run"),
    }
    assert launch(parse_run(Document(values, "test"))) is Outcome.FINISHED
    arguments = [argument for _, command in _processes(lambda process: process.cmdline()) for argument in command]
    assert any("gcs_server" in argument for argument in arguments)
    written = [path for folder in (tmp_path, Path(session._directory[0])) for path in folder.rglob("*") if path.is_file()]
    assert any(path.name.startswith("raylet") for path in written) and any(path.name == "config.yaml" for path in written)
    for secret in (CANARY, os.environ["RAY_AUTH_TOKEN"]):
        assert not [argument for argument in arguments if secret in argument]
        assert not [str(path) for path in written if secret.encode() in path.read_bytes()]


def test_a_cluster_that_lets_anybody_in_is_warned_of() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    opened = subprocess.Popen(
        [sys.executable, "-c", OPEN], env=environment | {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert opened.stdout is not None
        address = opened.stdout.readline().strip()
        assert not address.startswith("127.") and session.accepts_anybody(address)
        joined = subprocess.run(
            [sys.executable, "-c", JOIN], env=environment | {"RAY_ADDRESS": address}, capture_output=True, text=True, timeout=120
        )
    finally:
        _, said = opened.communicate(timeout=60)
    assert "RAY_AUTH_MODE=disabled: whoever reaches its ports can run code as you, and read all that it holds. Unset it" in said
    assert "Ray listens on every interface of this machine: whoever reaches its ports" in said
    assert joined.stdout.strip() == "ran"
    assert f"the Ray cluster at {address} asks for no token: whoever reaches its ports can run code as you" in joined.stderr


def test_a_worker_that_outlives_its_node_is_ended_with_the_session(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    told = subprocess.run([sys.executable, "-c", STUCK], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert told.returncode == 0, told.stderr
    with contextlib.suppress(psutil.NoSuchProcess):
        worker = psutil.Process(int(told.stdout.split()[0]))
        _, left = psutil.wait_procs([worker], 10)  # it is dead, and its new parent may not have heard yet
        for each in left:
            each.kill()
        assert not left
