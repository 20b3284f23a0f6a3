"""What runs in KubeRay's pods, in a shell with stand-ins; and what Ray makes of it, on a head of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from gentrain.cluster.kuberay_pods import ASK, LEAVE_HEAD, leave_worker, run_script
from tests.cluster.test_jobs import Head, cluster

JOB = '{"runtime_env": {}, "metadata": {"job_submission_id": "job-7", "job_name": "job-7"}}'
# A command that stops as gentrain does, with a checkpoint that takes a moment.
COMMAND = """
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.7)
    pathlib.Path("checkpoint").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("ready").touch()
time.sleep(60)
"""
# Ray signals the job that it is asked to stop: the parent of `ray`.
RAY = """#!/bin/bash
printf '%s\\n' "$*" >> "$RECORD/ray"
[[ $1 != job ]] || (sleep 0.3; kill -s TERM "$PPID") &
exit 0
"""


class Pod:
    """A directory in place of a pod's /tmp, /proc and /etc/gentrain."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "ray").write_text(RAY)
        (folder / "bin" / "ray").chmod(0o755)
        self.environment = os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}", "RECORD": str(folder), "POD_IP": "10.0.0.7"}

    def here(self, script: str) -> str:
        for path in ("/tmp/gentrain.pid", "/tmp/gentrain.stop", "/proc/[0-9]*", "/etc/gentrain"):  # whole: Python itself may lie in /tmp
            script = script.replace(path, f"{self.folder}/{Path(path).name}" if Path(path).name != "gentrain" else str(self.folder))
        return script

    def start(self, script: str, **environment: str) -> subprocess.Popen[str]:
        command = ["bash", "-c", self.here(script)]
        return subprocess.Popen(command, env=self.environment | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, command: str, **environment: str) -> subprocess.Popen[str]:
        return self.start(run_script([sys.executable, "-c", command], 8265), **environment)

    def asked_of_ray(self) -> list[str]:
        record = self.folder / "ray"
        return record.read_text().splitlines() if record.exists() else []


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def _await(condition: Callable[[], Any], within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("status", [1, 2])
def test_what_would_fail_again_is_stopped_so_that_it_is_not_started_again(pod: Pod, status: int) -> None:
    process = pod.run(f"import sys; sys.exit({status})", RAY_JOB_CONFIG_JSON_ENV_VAR=JOB)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == status and f"ended by itself with exit status {status}, and is not started again" in told
    assert pod.asked_of_ray() == ["job stop --no-wait --address=http://10.0.0.7:8265 job-7"]


@pytest.mark.parametrize("status", [0, 75, 130, -signal.SIGKILL])
def test_what_is_done_or_was_cut_off_keeps_its_status(pod: Pod, status: int) -> None:
    end = f"sys.exit({status})" if status >= 0 else f"os.kill(os.getpid(), {-status})"
    process = pod.run(f"import os, sys; {end}", RAY_JOB_CONFIG_JSON_ENV_VAR=JOB)
    assert process.wait(60) == (status if status >= 0 else 128 - status) and pod.asked_of_ray() == []
    assert not (pod.folder / "gentrain.pid").exists()  # another process may get that number


def test_by_hand_nobody_is_asked_to_stop_it(pod: Pod) -> None:
    assert pod.run("import sys; sys.exit(2)", RAY_JOB_CONFIG_JSON_ENV_VAR="").wait(60) == 2 and pod.asked_of_ray() == []


def test_a_command_is_asked_for_its_checkpoint(pod: Pod) -> None:
    process = pod.run(COMMAND, RAY_JOB_CONFIG_JSON_ENV_VAR=JOB)
    _await((pod.folder / "ready").exists)
    assert pod.start(ASK).wait(10) == 0
    assert process.wait(60) == 75 and (pod.folder / "checkpoint").exists() and pod.asked_of_ray() == []


def test_who_asks_before_the_command_has_started_is_heard(pod: Pod) -> None:
    asks = pod.start(ASK)
    assert asks.wait(10) == 0 and asks.communicate()[0] == ""
    process = pod.run(COMMAND, RAY_JOB_CONFIG_JSON_ENV_VAR=JOB)
    assert process.wait(60) in (75, 128 + signal.SIGTERM)  # the second before it can tell what the signal means


def test_ray_may_signal_the_script_too(pod: Pod) -> None:
    """Ray signals a job that it stops with all that it has started, as it does when the job is deleted."""
    process = pod.run(COMMAND, RAY_JOB_CONFIG_JSON_ENV_VAR=JOB)
    _await((pod.folder / "ready").exists)
    for _ in range(3):
        for each in [process, *psutil.Process(process.pid).children(recursive=True)]:
            each.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.wait(60) == 75 and (pod.folder / "checkpoint").exists()


def test_a_head_stays_until_the_command_has_published(pod: Pod) -> None:
    process = pod.run(COMMAND)
    _await((pod.folder / "ready").exists)
    assert pod.start(LEAVE_HEAD).wait(60) is not None and (pod.folder / "checkpoint").exists()
    assert process.wait(60) == 75
    leaves = pod.start(LEAVE_HEAD)  # nothing runs, and nothing is waited for
    assert leaves.wait(10) is not None


@pytest.mark.parametrize("title", ["ray::RayTrainWorker", "ray::_Trial.step", "ray::Reward"])
def test_a_training_pod_tells_the_run_and_stays_until_the_run_has_left_it(pod: Pod, title: str) -> None:
    def runs(number: int, name: str) -> None:
        (pod.folder / str(number)).mkdir(exist_ok=True)
        (pod.folder / str(number) / "cmdline").write_bytes(name.encode() + b"\0" * 20)

    raylet = "/bin/raylet\0--node_id=c0ffee\0--x"
    for number, name in enumerate([title, "ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", raylet, "python"]):
        runs(number, name)
    leaves = pod.start(leave_worker(90))
    _await(pod.asked_of_ray)
    why = "--reason=DRAIN_NODE_REASON_PREEMPTION --reason-message=its pod is taken away"
    assert pod.asked_of_ray() == [f"drain-node --node-id=c0ffee {why} --deadline-remaining-seconds=90"]
    time.sleep(1.5)
    assert leaves.poll() is None
    runs(0, "ray::IDLE")
    assert leaves.wait(30) == 0


# --- with Ray ------------------------------------------------------------------------------------------------------------


@pytest.mark.cluster
@pytest.mark.timeout(400)
def test_ray_calls_stopped_what_is_not_to_start_again_and_gives_up_a_node(tmp_path: Path) -> None:
    """KubeRay starts a job again that is FAILED. A node that is to go, and has nothing to do, goes."""
    (tmp_path / "head").mkdir()
    with cluster(tmp_path / "head", cpus=1) as head:
        _jobs_end(head)
        _node_goes(head, tmp_path)


def _jobs_end(head: Head) -> None:
    port, path = int(head.address.rpartition(":")[2]), f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def ask(method: str, url: str, **body: Any) -> Any:
        token = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
        for _ in range(100):
            answer = requests.request(method, f"{head.address}/api/jobs/{url}", headers=token, json=body or None, timeout=60)
            if "No available agent" not in answer.text:  # of a head that has just been started
                break
            time.sleep(0.5)
        assert answer.ok, answer.text
        return answer.json()

    def submit(name: str, end: str) -> None:
        (pod := Pod(head.folder / name)).folder.joinpath("run.sh").write_text(
            pod.here(run_script([sys.executable, "-c", f"import os, sys; {end}"], port))
        )
        variables = {"POD_IP": "127.0.0.1", "PATH": path}
        ask("POST", "", entrypoint=f"bash {pod.folder}/run.sh", submission_id=name, runtime_env={"env_vars": variables})

    submit("final", "sys.exit(2)")
    submit("cut_off", "os.kill(os.getpid(), 9)")
    for name, status in (("final", "STOPPED"), ("cut_off", "FAILED")):
        _await(lambda name=name: ask("GET", name)["status"] not in ("PENDING", "RUNNING"), 200)
        assert ask("GET", name)["status"] == status, ask("GET", f"{name}/logs")
    assert "ended by itself with exit status 2" in ask("GET", "final/logs")["logs"]


def _node_goes(head: Head, folder: Path) -> None:
    def raylets() -> list[list[str]]:
        found = (each.info["cmdline"] for each in psutil.process_iter(["name", "cmdline"]) if each.info["name"] == "raylet")
        return [command for command in found if command and str(head.scratch) in " ".join(command)]

    (raylet,) = raylets()
    (address,) = [argument.partition("=")[2] for argument in raylet if argument.startswith("--gcs-address=")]
    pod = Pod(folder / "pod")
    (pod.folder / "7").mkdir()
    (pod.folder / "7" / "cmdline").write_text("\0".join([*raylet, ""]))
    loopback = {"RAY_ADDRESS": address, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # or Ray asks for this machine's address instead
    environment = head.environment | loopback | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = ["bash", "-c", pod.here(leave_worker(90))]
    leaves = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert leaves.returncode == 0 and leaves.stderr == ""
    _await(lambda: not raylets(), 60)
