"""What is sent to a place, and what is not; what finds a submitted run again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from gentrain.cluster import packages, ray_jobs, submissions
from gentrain.cluster.local import Local
from gentrain.cluster.packages import contents, listed, zipped
from gentrain.cluster.places import Place, PlaceError, State, Submission
from gentrain.cluster.ray_jobs import RayJobs
from gentrain.cluster.submissions import find, output_at, place_of, read, send, submission_of
from gentrain.cluster.versions import stamp
from gentrain.config import ConfigError, Document
from gentrain.training.cluster import Cluster, Network

CANARY = "canary-0c52"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _place(submit: Any) -> Any:
    return place_of(Document({"cluster": {"submit": submit}}, "toy.yaml"))


def _submission(place: Any = None, **config: Any) -> Submission:
    values = {"output": "/there/toy", "cluster": {"place": "ray", "submit": {"name": "slurm"}}, **config}
    clusters = [Cluster(place="ray", workers=(1, 4), cpus_per_worker=2), Cluster(workers=1)]
    return submission_of(place or RayJobs(), "train", "runs/toy", values, clusters)


# --- from a configuration to a submission -----------------------------------------------------------------------------------


def test_a_submission_says_all_that_a_place_has_to_know() -> None:
    sent = _submission(
        RayJobs(environment={"A": "b"}, secrets=["TOKEN"]), data={"token": "${oc.env:BUCKET}", "other": "${oc.env:X,default}"}
    )
    assert (sent.name, sent.command, sent.output) == ("toy", ("gentrain", "train", "config.yaml"), "/there/toy")
    assert (sent.workers, sent.cpus_per_worker, sent.under_ray) == ((1, 4), 2, True)
    assert sent.secrets == ("BUCKET", "TOKEN") and sent.environment == {"A": "b"}
    config = yaml.safe_load(sent.config)
    assert config["cluster"] == {"place": "ray"} and config["data"]["token"] == "${oc.env:BUCKET}"  # where to send it is of no use there


def test_the_directory_at_the_place() -> None:
    assert output_at(Local(), "runs/toy") == os.path.join(os.getcwd(), "runs/toy")
    assert output_at(RayJobs(storage="/shared"), "runs/toy") == "/shared/runs/toy"
    assert output_at(RayJobs(storage="/shared"), "/scratch/toy") == "/scratch/toy"


@pytest.mark.parametrize("name", ["-rf", "a b", "a\nb", "$(id)", "a;b", "..", "", "ä", "a" * 64])
def test_a_name_that_a_shell_or_scheduler_could_misread_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no name for a job"):
        submission_of(RayJobs(), "train", f"runs/{name}" if name else "/", {"output": "/x", "cluster": {}}, [])


@pytest.mark.parametrize(
    "submit, key",
    [
        ({"name": "ray", "address": "os.path://x"}, "submit.address"),  # Ray would import what stands before ://
        ({"name": "ray", "address": "ray://h:1"}, "submit.address"),
        ({"name": "ray", "address": "http://user:password@h:1"}, "submit.address"),
        ({"name": "ray", "address": "file:///etc/passwd"}, "submit.address"),
        ({"name": "ray", "address": "http://"}, "submit.address"),
        ({"name": "ray", "environment": {"A;id": "x"}}, "submit.environment"),
        ({"name": "ray", "environment": {"A": "x\ny"}}, "submit.environment"),
        ({"name": "ray", "secrets": ["$(id)"]}, "submit.secrets"),
        ({"name": "ray", "storage": "here"}, "submit.storage"),
        ({"name": "ray", "size_limit_mib": 0}, "submit.size_limit_mib"),
        ({"name": "ray", "adress": "http://h:1"}, "submit.adress"),
        ({"name": "local", "storage": "/x"}, "submit.storage"),
        ("ayr", "submit.name"),
        ({"address": "http://h:1"}, "submit.address"),  # of the default, local
        (3, "submit"),
    ],
)
def test_a_mistaken_or_hostile_section_is_refused(submit: Any, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _place(submit)
    assert caught.value.source == "toy.yaml" and caught.value.key == f"cluster.{key}"


@pytest.mark.parametrize("name", ["local", "ray", "slurm", "kuberay"])
def test_no_key_of_a_place_takes_what_it_holds_from_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be written into scripts, arguments and the record."""
    monkeypatch.setenv("VAULT_TOKEN", CANARY)
    keys = [field.name for field in dataclasses.fields(Place.available()[name])]
    assert {"environment", "secrets", "storage"} <= set(keys)
    read = "${oc.env:VAULT_TOKEN}"
    for key in keys:
        for value in (read, f"x {read} y", [f"export TOKEN={read}"], {"A": read}, "${oc.env:VAULT_TOKEN,x}"):
            with pytest.raises(ConfigError, match="name the variable in `secrets`") as caught:
                _place({"name": name, key: value})
            assert caught.value.key == f"cluster.submit.{key}" and CANARY not in str(caught.value)
    for submit, key in (({"name": read}, "cluster.submit.name"), (read, "cluster.submit")):
        with pytest.raises(ConfigError, match="name the variable in `secrets`") as caught:
            _place(submit)
        assert caught.value.key == key


def test_the_variables_of_the_network() -> None:
    network = Network(interface="ib0", variables={"NCCL_IB_HCA": "mlx5"})
    assert network.environment() == {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0", "NCCL_IB_HCA": "mlx5"}
    assert Network().environment() == {}
    with pytest.raises(ConfigError, match="LD_PRELOAD is no variable of NCCL or gloo"):
        Network(variables={"LD_PRELOAD": "x.so"})


# --- packages ---------------------------------------------------------------------------------------------------------------


def _tree(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def test_what_is_ignored_is_not_sent(folder: Path) -> None:
    kept = ["a.py", "data/b.txt", "data/deep/c.py", "environment.yaml"]
    secret = [
        ".env",
        ".env.local",
        "data/.env",
        "key.pem",
        "x/tls.key",
        ".ssh/id_rsa",
        ".aws/credentials",
        ".netrc",
        "deploy/id_ed25519",
        "x.p12",
    ]
    secret += [".git-credentials", ".cache/huggingface/token"]
    waste = [".git/config", "a/__pycache__/a.pyc", ".venv/bin/python", "runs/toy/config.yaml", ".mypy_cache/x", "node_modules/x.js"]
    _tree(folder, [*kept, *secret, *waste, "big/x.bin", "data/big/y.bin", "data/skip/z"])
    (folder / "link.py").symlink_to("/etc/passwd")
    (folder / "linked").symlink_to("/etc")
    os.mkfifo(folder / "pipe")
    assert sorted(name for name, _ in listed(folder, ["big", "data/skip/"])) == kept
    assert "big/x.bin" in dict(listed(folder, [])) and "data/skip/z" in dict(listed(folder, ["skip/z"]))


def test_a_name_that_cannot_be_printed_is_refused(folder: Path) -> None:
    _tree(folder / "t", ["a\x1b[2Jb"])
    with pytest.raises(ConfigError, match="no name to send"):
        list(listed(folder / "t", []))


def test_the_limits_name_what_is_too_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = _tree(folder / "t", ["small.py"])
    (tree / "large.bin").write_bytes(b"x" * 2**20)
    with pytest.raises(ConfigError, match=r"1\.0 MiB are more than 1; the largest: large.bin, small.py; ignore them"):
        contents({}, tree, [], 1)
    assert set(contents({}, tree, ["*.bin"], 1)) == {"small.py"}
    monkeypatch.setattr(packages, "MAX_FILES", 1)
    with pytest.raises(ConfigError, match="more than 1 files"):
        contents({}, tree, [], 50)


def test_what_is_named_goes_before_what_lies_there(folder: Path) -> None:
    _tree(folder / "t", ["config.yaml"])
    assert contents({"config.yaml": b"ours"}, folder / "t", [], 1) == {"config.yaml": b"ours"}


def test_a_package_follows_from_its_contents() -> None:
    made = zipped({"b": b"2", "a/c": b"1"})
    assert made == zipped({"a/c": b"1", "b": b"2"}) != zipped({"a/c": b"1", "b": b"3"})
    with zipfile.ZipFile(BytesIO(made)) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {"a/c": b"1", "b": b"2"}
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_what_a_ray_job_would_be_sent(folder: Path) -> None:
    _tree(folder / "code", ["helper.py", ".env"])
    for name in ("one", "two"):
        _tree(folder / name, ["plugin.py"])
    (folder / "gentrain-0-py3-none-any.whl").write_bytes(zipped({"gentrain/__init__.py": b"", "gentrain-0.dist-info/METADATA": b""}))
    _tree(folder, ["empty-0-py3-none-any.whl", "gentrain-0.tar.gz"])
    place = _place({
        "name": "ray", "working_directory": "code", "wheel": "gentrain-0-py3-none-any.whl", "environment": {"OMP_NUM_THREADS": "2"},
        "python": "/opt/a b/python", "secrets": ["TOKEN"], "cpus": 1, "grace_s": 90,
    })  # fmt: skip
    run = {"plugins": [str(folder / "one/plugin.py"), "installed.module"]}
    sent = _submission(place, plugins=[str(folder / "two/plugin.py")], stages={"a": {"run": run}, "b": {"run": "runs/a"}, "c": {}})
    files = place.render(sent)
    request = json.loads(files["job.json"])
    assert request["entrypoint"] == "exec '/opt/a b/python' -m gentrain.cli train config.yaml"
    assert request["runtime_env"] == {
        "working_dir": "the files of package.txt, zipped",
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90", "OMP_NUM_THREADS": "2", **stamp()},
    }
    config = yaml.safe_load(files["config.yaml"])
    plugins = [*config["plugins"], *config["stages"]["a"]["run"]["plugins"]]
    assert plugins[2] == "installed.module" and len(set(plugins)) == 3
    packaged = place._files(sent)
    assert {packaged[name] for name in plugins[:2]} == {b"plugin.py"}
    unpacked = {"gentrain/__init__.py", "gentrain-0.dist-info/METADATA"}
    assert set(packaged) == {"config.yaml", "helper.py", *plugins[:2], *unpacked}
    assert [line.split()[-1] for line in files["package.txt"].splitlines()] == sorted(packaged)
    for key, value in {"wheel": "nowhere.whl", "working_directory": "nowhere"}.items():
        with pytest.raises(ConfigError, match="nowhere"):
            replace(place, **{key: value}).render(sent)
    for wheel in ("empty-0-py3-none-any.whl", "gentrain-0.tar.gz"):
        with pytest.raises(ConfigError, match="is no wheel of pure Python"):
            replace(place, wheel=wheel).render(sent)


def test_a_log_is_followed_through_a_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray sends it from its beginning each time; nothing is told twice."""
    streams = [["a"], ["a", "b", "c"], ["a", "b", "c", "d"]]
    states = [State.RUNNING, State.SUCCEEDED]

    def tail(place: RayJobs, identity: str) -> Iterator[str]:
        yield from streams.pop(0)
        raise ray_jobs._Disconnected

    monkeypatch.setattr(RayJobs, "_tail", tail)
    monkeypatch.setattr(RayJobs, "_so_far", lambda place, identity: iter(streams.pop(0)))  # once the job is over
    monkeypatch.setattr(RayJobs, "status", lambda place, handle: states.pop(0))
    assert list(RayJobs().logs({"id": "toy"}, follow=True)) == ["a", "b", "c", "d"]
    assert streams == [] and states == []


# --- the place `local`, and the record ---------------------------------------------------------------------------------------


@pytest.fixture
def stub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Submission]:
    """Submits a stand-in for gentrain, which is a shell script; what it started is gone when the test ends."""
    script = folder / "python"
    script.write_text("#!/bin/sh\necho began; echo $SHOWN\ntrap 'exit 75' TERM\n[ -e quick ] && exit 3\nwhile :; do sleep 0.05; done\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setenv("VAULT_TOKEN", CANARY)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    place = Local(environment={"SHOWN": "shown"}, secrets=["VAULT_TOKEN"])
    yield submission_of(place, "train", "runs/toy", {"output": str(folder / "runs/toy"), "cluster": {}}, [])
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    for child in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(left, timeout=10)


PLACE = Local(environment={"SHOWN": "shown"}, secrets=["VAULT_TOKEN"])


def _until(handle: dict[str, Any], state: State) -> None:
    deadline = time.monotonic() + 20
    while PLACE.status(handle) is not state:
        assert time.monotonic() < deadline, PLACE.status(handle)
        time.sleep(0.02)


def test_a_local_job_outlives_the_command_and_is_found_by_its_name(stub: Submission, folder: Path) -> None:
    send(PLACE, stub)
    place, record = find("toy")
    handle = record["handle"]
    assert place == PLACE and record["submission"] == stub and place.status(handle) is State.RUNNING
    assert os.getsid(handle["pid"]) != os.getsid(0)  # closing the terminal does not end it
    assert read(folder / "runs/toy")[1] == record == find(str(folder / "runs/toy"))[1]
    lines = place.logs(handle, follow=True)
    assert [next(lines), next(lines)] == ["began", "shown"]
    with pytest.raises(ConfigError, match="toy is running already"):
        send(place, stub)
    place.stop(handle)
    assert list(lines) == []  # it ends with the job
    assert place.status(handle) is State.STOPPED
    place.stop(handle)
    handle = send(place, record["submission"])
    assert handle["log"].endswith("2.log") and find("toy")[1]["handle"] == handle
    next(place.logs(handle, follow=True))
    os.killpg(handle["pid"], signal.SIGTERM)  # as whoever ends a session does: the exit status is written down all the same
    _until(handle, State.STOPPED)


def test_how_a_local_job_ended(stub: Submission, folder: Path) -> None:
    handle = send(PLACE, stub)
    next(PLACE.logs(handle, follow=True))
    child = psutil.Process(handle["pid"]).children()[0]
    child.kill()
    _until(handle, State.FAILED)
    (folder / "quick").touch()
    handle = send(PLACE, stub)
    _until(handle, State.FAILED)
    assert list(PLACE.logs(handle, follow=False)) == ["began", "shown"]
    (folder / "quick").unlink()
    handle = send(PLACE, stub)
    next(PLACE.logs(handle, follow=True))
    keeper = psutil.Process(handle["pid"])
    Path(handle["status"]).write_text("143")
    assert PLACE.status(handle) is State.RUNNING
    Path(handle["status"]).unlink()
    for process in (keeper, *keeper.children()):
        process.kill()
    _until(handle, State.LOST)
    Path(handle["status"]).write_text("143")  # asked to stop before it had begun
    assert PLACE.status(handle) is State.STOPPED


def test_a_process_that_has_got_the_number_since_is_left_alone(stub: Submission) -> None:
    with subprocess.Popen(["/bin/sh", "-c", "sleep 60 & wait"]) as other:
        handle = {"host": socket.gethostname(), "pid": other.pid, "started": psutil.Process(other.pid).create_time() - 5, "status": "none"}
        PLACE.stop(handle)
        assert PLACE.status(handle) is State.LOST and psutil.Process(other.pid).is_running()
        for process in (*psutil.Process(other.pid).children(), other):
            process.send_signal(signal.SIGKILL)
    with pytest.raises(PlaceError, match="submitted on elsewhere"):
        PLACE.status({**handle, "host": "elsewhere"})


def test_no_secret_is_written(stub: Submission, folder: Path) -> None:
    send(PLACE, stub)
    written = [path for path in (folder / "runs").rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {submissions.RECORD, "config.yaml", "1.log"}
    assert not [path for path in written if CANARY in path.read_text()]
    assert {path.stat().st_mode & 0o77 for path in written if path.name in (submissions.RECORD, "config.yaml")} == {0}


def test_a_record_that_is_damaged_or_foreign_is_refused(stub: Submission, folder: Path) -> None:
    send(PLACE, stub)
    record = folder / "runs/toy" / submissions.RECORD
    whole = record.read_text()
    record.chmod(0o666)
    with pytest.raises(ConfigError, match="may be written by other users"):
        find("toy")
    record.chmod(0o600)
    for damaged in ("", "{}", whole[:100], whole.replace('"name": "local"', '"name": "elsewhere"'), '{"place": ' * 5_000):
        record.write_text(damaged)
        with pytest.raises(ConfigError, match=r"submission\.json"):
            find("toy")
    record.unlink()
    record.symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="a link"):
        find("toy")


def test_a_name_nearly_right_is_told(stub: Submission) -> None:
    send(PLACE, stub)
    with pytest.raises(ConfigError, match="did you mean toy"):
        find("toi")
    with pytest.raises(ConfigError, match="submitted from here: toy"):
        find("../../etc")
