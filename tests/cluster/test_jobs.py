"""Ray Jobs: a head that the test starts on loopback with a token; submit, follow, kill, resume, stop, and who is refused."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from gentrain.cluster.places import Submission
from gentrain.cluster.ray_jobs import RayJobs
from gentrain.cluster.versions import SUBMITTED_WITH, installed
from gentrain.training.run import METRICS
from tests.distributed.cases import newest
from tests.reliability.accounts import repeated, seen
from tests.reliability.leftovers import await_none, processes

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

PLUGIN = Path(__file__).parents[1] / "reliability" / "plugin_faults.py"
CANARY = "canary-71fd"
SAMPLES = 2_000
# Commands one after the other in one process: most of what one costs is its imports.
SHELL = """
import json, sys
from gentrain import cli
for line in sys.stdin:
    status = cli._guarded(lambda **options: cli.app(args=json.loads(line), **options))
    print(f"status {status}", flush=True)
"""
# `ray start` lets no further node join on loopback.
NODE = """
import signal, sys
from ray._private import node, parameter
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
joined = parameter.RayParams(
    gcs_address=sys.argv[1], node_ip_address="127.0.0.1", num_cpus=int(sys.argv[2]), min_worker_port=0, max_worker_port=0,
    node_manager_port=0, dashboard_agent_listen_port=0, include_log_monitor=False, temp_dir=sys.argv[3],
)
node.Node(joined, head=False, shutdown_at_exit=True, spawn_reaper=True)
signal.pause()
"""


@dataclass
class Head:
    """A Ray cluster, and how to speak to it."""

    address: str
    folder: Path
    environment: dict[str, str]  # of a client that has the token
    scratch: Path


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with cluster(tmp_path_factory.mktemp("jobs"), cpus=2) as started:
        yield started


@contextmanager
def cluster(folder: Path, cpus: int, further_nodes: int = 0) -> Iterator[Head]:
    """A head, and as many further nodes, of so many cores each. When it ends, nothing that they or their jobs started is left."""
    scratch = Path(tempfile.mkdtemp(prefix="gt-"))  # Ray's sockets want short names
    ports = []
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    client = plain | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "HOME": str(folder), "COLUMNS": "250"}
    server = client | {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "TMPDIR": str(scratch),
        "VAULT_TOKEN": CANARY,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's 15 leaves its workers next to nothing of a machine that others use, too
    }
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1",
        f"--port={ports[0]}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}", f"--temp-dir={scratch}/r",
    ]  # fmt: skip
    started: list[subprocess.Popen] = []
    try:
        with (folder / "head.log").open("wb") as log:
            # Of nodes that share a directory of Ray's, one would delete what was sent to the other.
            further = ([sys.executable, "-c", NODE, f"127.0.0.1:{ports[0]}", str(cpus), f"{scratch}/{n}"] for n in range(further_nodes))
            for each in [command, *further]:
                started.append(subprocess.Popen(each, env=server, stdout=log, stderr=subprocess.STDOUT))
                _await(lambda: _listens(ports[1]), started[0], lambda: (folder / "head.log").read_text())
        yield Head(f"http://127.0.0.1:{ports[1]}", folder, client, scratch)
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(60)
        try:
            await_none(scratch, 60)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _await(condition: Callable[[], bool], alive: subprocess.Popen, told: Callable[[], str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert alive.poll() is None and time.monotonic() < deadline, told()
        time.sleep(0.05)


class Shell:
    """A process that runs gentrain's commands: (exit status, what it printed)."""

    def __init__(self, head: Head):
        self._log = head.folder / "shell.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SHELL],
                cwd=head.folder,
                env=head.environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )

    def __call__(self, *arguments: str) -> tuple[int, str]:
        before = len(self._log.read_text())
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        _await(lambda: "\nstatus " in "\n" + self._log.read_text()[before:], self.process, self._log.read_text)
        printed, _, status = self._log.read_text()[before:].rpartition("status ")
        assert "Traceback" not in printed, printed
        return int(status), printed


@pytest.fixture(scope="module")
def shell(head: Head) -> Iterator[Shell]:
    shell = Shell(head)
    yield shell
    shell.process.kill()
    shell.process.communicate()


def _gentrain(head: Head, *arguments: str, **changed: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "gentrain.cli", *arguments], cwd=head.folder, env=head.environment | changed, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def config(head: Head) -> Path:
    """Of a run that takes its time, with a plugin that has to travel with it."""
    values = {
        "method": {"name": "faulty_flow", "directory": str(head.folder), "step_s": 0.05},
        "plugins": [str(PLUGIN)],
        "data": "rings",
        "model": {"name": "mlp", "width": 8, "depth": 1},
        "engine": "torch",
        "training": {"samples": SAMPLES, "batch_size": 16, "log_every": 16, "checkpoint_every": 160},
        "cluster": {"submit": {"name": "ray", "address": head.address, "python": sys.executable, "secrets": ["VAULT_TOKEN"]}},
        "output": "runs/toy",
    }
    path = head.folder / "toy.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_job_is_followed_killed_resumed_stopped_and_resumed_to_its_end(head: Head, shell: Shell) -> None:
    path, run = config(head), head.folder / "runs/toy"
    status, printed = shell("submit", str(path))
    assert status == 0 and "submitted: toy to ray" in printed and "gentrain logs toy -f" in printed, printed
    assert "VAULT_TOKEN" in printed and CANARY not in printed
    follower = _gentrain(head, "logs", "toy", "-f")  # another process, which knows nothing but the run's name
    _await(lambda: (head.folder / "seen.jsonl").exists() and len(seen(head.folder)) >= 25, shell.process, lambda: shell("logs", "toy")[1])
    status, printed = shell("submit", str(path))
    assert status == 2 and "toy is running already" in printed
    for driver in processes(head.scratch):
        if driver.cmdline()[1:4] == ["-m", "gentrain.cli", "train"]:
            driver.send_signal(signal.SIGKILL)
    followed, _ = follower.communicate(timeout=60)
    assert follower.returncode == 0 and "loading the plugin" in followed and "/plugins/" in followed, followed
    assert "WebSocket" not in followed
    assert "failed" in shell("status", "toy")[1]

    assert shell("resume", "toy")[0] == 0
    before = len(seen(head.folder))
    _await(lambda: len(seen(head.folder)) >= before + 20, shell.process, lambda: shell("logs", "toy")[1])
    assert "running" in shell("status")[1]
    assert shell("stop", "toy")[0] == 0
    _await(lambda: "stopped" in shell("status", "toy")[1], shell.process, lambda: shell("logs", "toy")[1])
    stopped = int(newest(run).name)

    assert shell("resume", "toy")[0] == 0
    status, printed = shell("logs", "toy", "-f")
    assert status == 0 and "trained: " in printed, printed
    assert "succeeded" in shell("status", "toy")[1] and int(newest(run).name) == SAMPLES
    events = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    starts = [event["samples"] for event in events if event["event"] == "started"]
    assert starts[0] == 0 and starts[1] >= 160 and starts[2] == stopped  # from checkpoints, the last one without a sample lost
    assert repeated(head.folder, SAMPLES) <= 160 + 16  # what followed a checkpoint when it was killed, and nothing when it was stopped
    assert [json.loads(line)["samples"] for line in (run / METRICS).read_text().splitlines()][-1] == SAMPLES


@pytest.mark.parametrize("token, what", [("0" * 64, "this token is refused by"), ("", "there is no token for")])
def test_who_has_not_the_token_is_refused(head: Head, token: str, what: str) -> None:
    changed = {"RAY_AUTH_TOKEN": token}
    refused = _gentrain(head, "submit", str(config(head)), "output=runs/other", **changed)
    printed, _ = refused.communicate(timeout=120)
    assert refused.returncode == 1 and f"{what} the Ray cluster at {head.address}" in printed and "Traceback" not in printed
    assert not (head.folder / "runs/other/submission.json").exists()


def test_a_cluster_with_another_gentrain_says_so(head: Head, shell: Shell) -> None:
    """The job meets what it would meet in an image that is older than what submits to it."""
    other = f"cluster.submit.environment={{{SUBMITTED_WITH}: 'gentrain 99.0, Ray 2.60.0, Python 3.11'}}"
    assert shell("submit", str(config(head)), "output=runs/newer", other)[0] == 0
    printed = shell("logs", "newer", "-f")[1]
    assert f"submitted with gentrain 99.0, Ray 2.60.0, Python 3.11, and here are {installed()}; install the same" in printed
    assert "failed" in shell("status", "newer")[1] and not (head.folder / "runs/newer" / METRICS).exists()


def test_no_secret_is_in_a_file_or_an_argument(head: Head) -> None:
    written = [path for path in head.folder.rglob("*") if path.is_file()] + [path for path in head.scratch.rglob("*") if path.is_file()]
    assert any(path.name == "submission.json" for path in written)
    arguments = [argument for process in psutil.process_iter() for argument in _arguments(process)]
    for secret in (CANARY, head.environment["RAY_AUTH_TOKEN"]):
        assert not [str(path) for path in written if secret.encode() in path.read_bytes()]
        assert not [argument for argument in arguments if secret in argument]


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_head_that_cannot_start_jobs_yet_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["500: No available agent to submit job, please try again later.", "", "400: no such thing"]

    class Client:
        _server_ray_version = version("ray")

        def submit_job(self, **request: Any) -> None:
            if answer := answers.pop(0):
                raise RuntimeError(answer)

    monkeypatch.setattr(RayJobs, "_client", lambda place: nullcontext(Client()))
    monkeypatch.setattr(RayJobs, "_warn_of_risks", lambda place: None)
    place = RayJobs(address="http://127.0.0.1:1")
    submission = Submission("toy", "a: 1\n", ("gentrain", "train", "config.yaml"), tmp_path, str(tmp_path))
    handle = place.expected(submission)
    assert handle["id"].startswith("toy-") and place.submit(submission, handle) == handle
    with pytest.raises(RuntimeError, match="no such thing"):  # what will not change is told at once
        place.submit(submission, handle)
    assert answers == []
