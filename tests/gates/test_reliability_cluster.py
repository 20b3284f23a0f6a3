"""Runs under Ray that lose a worker, a node or the head, hang, shrink and grow: each comes to its end. See docs/reliability.md.

One machine poses as a head without cores and nodes of one core each. Times of recovery are from the fault to the next step.
"""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from gentrain.cluster.attempts import ATTEMPTS
from gentrain.training.run import METRICS
from gentrain.training.watchdog import STACKS
from tests.distributed.cases import difference, newest, state_of
from tests.reliability.accounts import repeated, seen
from tests.reliability.leftovers import await_none

pytestmark = [pytest.mark.gate, pytest.mark.cluster, pytest.mark.timeout(1800)]

PLUGIN = Path(__file__).parents[1] / "reliability" / "plugin_faults.py"
COMMAND = [sys.executable, "-c", "from gentrain.cli import main; main()", "train"]
BATCH, INTERVAL = 16, 800  # samples per step, and between checkpoints
WAIT_S = 600
TOKEN = secrets.token_hex(32)  # of all clusters here: Ray reads it once per process

Record = Callable[[str, object], None]


class Command:
    """`gentrain train` of a run under Ray, in a process of its own."""

    def __init__(self, folder: Path, samples: int, cluster: dict[str, Any], **settings: Any):
        self.folder, self.run, self.samples = folder, folder / "run", samples
        method = {"name": "faulty_flow", "directory": str(folder), "step_s": 0.05} | settings.pop("method", {})
        training = {"samples": samples, "batch_size": BATCH, "log_every": BATCH, "checkpoint_every": INTERVAL}
        values = {
            "method": method,
            "plugins": [str(PLUGIN)],
            "data": "rings",
            "model": {"name": "mlp", "width": 16},
            "engine": {"name": "deepspeed", "zero_stage": 2},
            "training": training | settings.pop("training", {}),
            "cluster": {"place": "ray", "workers": 2, "backoff_s": 1, **cluster},
            "output": str(self.run),
        }
        folder.mkdir(exist_ok=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(values))
        with (folder / "output.txt").open("w") as output:
            self.process = subprocess.Popen([*COMMAND, str(folder / "run.yaml")], stdout=output, stderr=output)

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.run / ATTEMPTS
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["event"] == name]

    def steps(self) -> int:
        return len(seen(self.folder)) if (self.folder / "seen.jsonl").exists() else 0

    def await_that(self, true: Callable[[], bool]) -> float:
        """Seconds until it is."""
        started = time.monotonic()
        while not true():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() - started < WAIT_S, self.said()
            time.sleep(0.1)
        return time.monotonic() - started

    def recovery(self, attempts: int) -> float:
        """Seconds until the first step of attempt number `attempts`."""
        passed = self.await_that(lambda: len(self.events("started")) >= attempts)
        steps = self.steps()
        return passed + self.await_that(lambda: self.steps() > steps)

    def workers(self) -> list[psutil.Process]:
        return [each for each in psutil.process_iter(["cmdline"]) if _is_worker(each) and self._writes(each)]

    def _writes(self, process: psutil.Process) -> bool:
        pids = {json.loads(line)["pid"] for line in (self.folder / "seen.jsonl").read_text().splitlines()[-20:]}
        return process.pid in pids

    def said(self) -> str:
        return (self.folder / "output.txt").read_text() + str(self.events("failed"))

    def end(self) -> int:
        return self.process.wait(timeout=WAIT_S)


def _is_worker(process: psutil.Process) -> bool:
    return "RayTrainWorker" in " ".join(process.info["cmdline"] or [])


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Command]]:
    """Starts commands. When they have ended, no process of theirs is left, nothing in the temporary directory, and no port."""
    scratch = Path(tempfile.mkdtemp(dir="/tmp", prefix="gt-"))  # short: Ray's sockets lie in it
    monkeypatch.setenv("TMPDIR", str(scratch))
    commands: list[Command] = []

    def call(name: str, samples: int, cluster: dict[str, Any], **settings: Any) -> Command:
        commands.append(Command(tmp_path / name, samples, cluster, **settings))
        return commands[-1]

    yield call
    for command in commands:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()
    await_none(scratch, 30)
    kept = list(scratch.glob("gentrain-ray-*"))
    shutil.rmtree(scratch)
    assert len(kept) == sum(command.process.returncode == 1 for command in commands)  # logs of what failed


class Nodes:
    """A head without cores and nodes of one core, all on this machine."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address: str = self._cluster.address
        self.nodes: list[Any] = []

    def add(self) -> None:
        self.nodes.append(self._cluster.add_node(num_cpus=1))

    def remove(self) -> None:
        """As a machine that loses its power."""
        self._cluster.remove_node(self.nodes.pop(), allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, start: object) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    made = Nodes()
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    try:
        made.add()
        made.add()
        yield made
    finally:
        made.close()


def _check_end(command: Command, lost: int) -> int:
    """Every sample was seen, and at most `lost` of them again; how many. The metrics are those of one attempt."""
    assert command.end() == 0, command.said()
    again = repeated(command.folder, command.samples)
    assert again <= lost
    lines = [json.loads(line)["samples"] for line in (command.run / METRICS).read_text().splitlines()]
    assert lines == list(range(BATCH, command.samples + 1, BATCH))
    assert newest(command.run).name == f"{command.samples:012d}"
    return again


def test_a_killed_worker(start: Callable[..., Command], nodes: Nodes, record_property: Record) -> None:
    whole = start("whole", 4000, {"workers": 1}, method={"step_s": 0})
    assert whole.end() == 0, whole.said()
    command = start("killed", 4000, {})
    command.await_that(lambda: command.steps() > 120)
    command.workers()[0].kill()
    record_property("seconds to recover", round(command.recovery(2), 1))
    record_property("samples drawn again", _check_end(command, INTERVAL + BATCH))
    assert [line["ranks"] for line in command.events("started")] == [2, 2]
    apart = difference(state_of(whole.run), state_of(command.run))
    record_property("weights apart from an uninterrupted run", apart)
    assert apart <= 1e-3


def test_a_lost_node_and_another_in_its_place(start: Callable[..., Command], nodes: Nodes, record_property: Record) -> None:
    command = start("node", 4000, {})
    command.await_that(lambda: command.steps() > 120)
    nodes.remove()
    time.sleep(10)
    nodes.add()
    record_property("seconds to recover, after the new node", round(command.recovery(2), 1))
    record_property("samples drawn again", _check_end(command, INTERVAL + BATCH))
    assert [line["ranks"] for line in command.events("started")] == [2, 2]


def test_fewer_workers_and_more_again(start: Callable[..., Command], nodes: Nodes, record_property: Record) -> None:
    command = start("elastic", 32_000, {"workers": [1, 2]})
    command.await_that(lambda: command.steps() > 120)
    nodes.remove()
    record_property("seconds to shrink", round(command.recovery(2), 1))
    nodes.add()
    record_property("seconds to grow", round(command.recovery(3), 1))
    record_property("samples drawn again", _check_end(command, 2 * (INTERVAL + BATCH)))
    assert [line["ranks"] for line in command.events("started")] == [2, 1, 2]


def test_a_node_that_is_taken_away_with_notice(start: Callable[..., Command], nodes: Nodes, record_property: Record) -> None:
    nodes.add()  # one more than needed
    command = start("notice", 4000, {"max_failures": 0})
    command.await_that(lambda: command.steps() > 120)
    where = ["--address", nodes.address, "--node-id", _node_of(command, nodes)]
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "120"]
    drain = [str(Path(sys.executable).with_name("ray")), "drain-node", *where, *why]
    drained = subprocess.run(drain, capture_output=True, text=True, timeout=60, check=False)
    assert drained.returncode == 0, drained.stderr
    record_property("seconds to go on elsewhere", round(command.recovery(2), 1))
    record_property("samples drawn again", _check_end(command, 0))
    assert command.events("failed") == []


def _node_of(command: Command, nodes: Nodes) -> str:
    """The node of one of the command's workers: the one whose raylet is its parent."""
    raylet = command.workers()[0].parent()
    assert raylet is not None
    return next(node.node_id for node in nodes.nodes if any(p.process.pid == raylet.pid for p in node.all_processes["raylet"]))


def test_the_head_dies(start: Callable[..., Command], record_property: Record) -> None:
    command = start("head", 4000, {})
    command.await_that(lambda: command.steps() > 120)
    (gcs,) = [each for each in psutil.Process(command.process.pid).children(recursive=True) if each.name() == "gcs_server"]
    gcs.kill()
    record_property("seconds to recover", round(command.recovery(2), 1))
    record_property("samples drawn again", _check_end(command, INTERVAL + BATCH))
    assert "the launcher died" in command.events("failed")[0]["reason"]


def test_a_hang(start: Callable[..., Command], record_property: Record) -> None:
    command = start("hang", 4000, {}, method={"fault": "hang", "at": 1800}, training={"hang_timeout_s": 5})
    command.await_that((command.folder / "happened").exists)
    record_property("seconds to recover, of which 5 are the limit", round(command.recovery(2), 1))
    record_property("samples drawn again", _check_end(command, INTERVAL + BATCH))
    reason = command.events("failed")[0]["reason"]
    (attempt,) = (command.run / STACKS).iterdir()
    assert reason.startswith("hung (training.hang_timeout_s)") and str(attempt) in reason
    assert sorted(path.name for path in attempt.iterdir()) == ["rank-0.txt", "rank-1.txt"]
    assert sum("_hang_for_ever" in path.read_text() for path in attempt.iterdir()) == 1


def test_a_signal(start: Callable[..., Command], record_property: Record) -> None:
    command = start("signal", 100_000, {})
    command.await_that(lambda: command.steps() > 120)
    asked = time.monotonic()
    command.process.send_signal(signal.SIGTERM)
    assert command.end() == 75, command.said()
    record_property("seconds from SIGTERM to the end", round(time.monotonic() - asked, 1))
    stopped = int(newest(command.run).name)
    assert max(max(step) for step in seen(command.folder)) == stopped - 1  # nothing was drawn for nothing


def test_a_signal_when_workers_cannot_answer(start: Callable[..., Command], record_property: Record) -> None:
    command = start("deaf", 4000, {"grace_s": 5}, method={"fault": "hang", "at": 1800})
    command.await_that((command.folder / "happened").exists)
    asked = time.monotonic()
    command.process.send_signal(signal.SIGTERM)
    assert command.end() == 75, command.said()
    passed = time.monotonic() - asked
    record_property("seconds from SIGTERM to the end, of which 5 are the grace", round(passed, 1))
    assert 5 < passed < 30
    assert newest(command.run).name == f"{1600:012d}"
    assert "grace_s" in command.events("abandoned")[0]["reason"]


def test_too_many_failures(start: Callable[..., Command]) -> None:
    command = start("failed", 4000, {"max_failures": 0}, method={"fault": "kill", "at": 1800})
    assert command.end() == 1
    assert "gave up" in command.said() and "after 0 restarts" in command.said()
