"""What is sent to a place, and what is not; what a cluster of Ray answers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import zipfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from gentrain.cluster import packages, ray_jobs
from gentrain.cluster.local import Local
from gentrain.cluster.packages import contents, listed, zipped
from gentrain.cluster.places import Place, PlaceError, State, Submission
from gentrain.cluster.ray_jobs import RayJobs
from gentrain.cluster.submissions import output_at, place_of, submission_of
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
    network = Network(interface="ib0")
    clusters = [Cluster(workers=1), Cluster(place="ray", workers=(1, 4), cpus_per_worker=2, grace_s=45.0, network=network)]
    return submission_of(place or RayJobs(), "train", "runs/toy", values, clusters)


# --- from a configuration to a submission -----------------------------------------------------------------------------------


def test_a_submission_says_all_that_a_place_has_to_know() -> None:
    sent = _submission(
        RayJobs(environment={"A": "b"}, secrets=["TOKEN"]), data={"token": "${oc.env:BUCKET}", "other": "${oc.env:X,default}"}
    )
    assert (sent.name, sent.command, sent.output) == ("toy", ("gentrain", "train", "config.yaml"), "/there/toy")
    assert (sent.workers, sent.cpus_per_worker, sent.under_ray) == ((1, 4), 2, True)
    assert (sent.grace_s, sent.interface) == (45.0, "ib0")  # those of what trains under Ray
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
    assert replace(place, grace_s=46).render(sent).keys() == files.keys()
    with pytest.raises(ConfigError, match="45 s for a checkpoint, and Ray kills a job 45 s after") as caught:
        replace(place, grace_s=45).render(sent)
    assert caught.value.key == "cluster.grace_s"
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
    monkeypatch.setattr(ray_jobs.time, "sleep", lambda seconds: None)
    assert list(RayJobs().logs({"id": "toy"}, follow=True)) == ["a", "b", "c", "d"]
    assert streams == [] and states == []


def test_a_cluster_that_is_away_is_waited_for_while_its_log_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at once again and again, not for ever, and not if it has never answered."""
    now, slept = [1.0], list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    def tail(place: RayJobs, identity: str) -> Iterator[str]:
        yield "a"
        raise ray_jobs._Disconnected

    def away(*_: Any) -> State:
        raise ray_jobs._Away("no Ray cluster answers")

    monkeypatch.setattr(ray_jobs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ray_jobs.time, "sleep", sleep)
    monkeypatch.setattr(RayJobs, "_tail", tail)
    monkeypatch.setattr(RayJobs, "_so_far", lambda place, identity: iter(["a", "b"]))
    states = [away] * 100 + [lambda *_: State.SUCCEEDED]
    monkeypatch.setattr(RayJobs, "status", lambda *_: states.pop(0)())
    assert list(RayJobs().logs({"id": "toy"}, follow=True)) == ["a", "b"]
    assert len(slept) == 101 and min(slept) >= 1
    for answers, message in (
        (away, "has told nothing new for 600 s"),
        (lambda *_: State.RUNNING, "nothing new"),
        (lambda *_: State.LOST, "not know"),
    ):
        monkeypatch.setattr(RayJobs, "status", answers)
        slept.clear()
        with pytest.raises(PlaceError, match=message):
            list(RayJobs().logs({"id": "toy"}, follow=True))
        assert len(slept) == (1 if message == "not know" else 301)
    slept.clear()
    monkeypatch.setattr(RayJobs, "_tail", away)
    with pytest.raises(PlaceError, match="no Ray cluster answers"):
        list(RayJobs().logs({"id": "toy"}, follow=True))
    assert not slept


def test_lines_of_a_log_so_far_are_those_that_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted: other signs that Python takes for the end of a line would tell some twice."""
    texts = ["", "a\n", "a\x0cb\u2028c\n\nd", "\n"]

    @contextlib.contextmanager
    def client(place: RayJobs) -> Iterator[Any]:
        yield SimpleNamespace(get_job_logs=lambda identity: texts[int(identity)], tail_job_logs=lambda identity: tail(texts[int(identity)]))

    async def tail(text: str) -> AsyncIterator[str]:
        for start in range(0, len(text), 2):
            yield text[start : start + 2]

    monkeypatch.setattr(RayJobs, "_client", client)
    lines = [list(RayJobs()._so_far(str(number))) for number in range(len(texts))]
    assert lines == [[], ["a"], ["a\x0cb\u2028c", "", "d"], [""]]
    assert lines == [list(RayJobs()._tail(str(number))) for number in range(len(texts))]


@pytest.mark.parametrize(
    "answer, state",
    [
        ("Request failed with status code 404: Job toy-1a does not exist.", State.LOST),
        ("Request failed with status code 500: Job toy-404 cannot be read.", None),  # a number that is part of the name
        ("Request failed with status code 400: no.", None),
        ("Version check returned 404.", None),
    ],
)
def test_what_the_job_server_refuses_is_told_as_the_words_of_a_place(
    answer: str, state: State | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gentrain status` of all places tells it of this one, and goes on."""

    class Client:
        def __init__(self, address: str):
            pass

        def get_job_info(self, identity: str) -> None:
            raise RuntimeError(answer)

    refused = SimpleNamespace(AuthenticationError=type("AuthenticationError", (Exception,), {}))
    modules = {"ray": SimpleNamespace(), "ray.exceptions": refused, "ray.job_submission": SimpleNamespace(JobSubmissionClient=Client)}
    for name, module in modules.items():  # Ray itself would keep for later tests what it reads of the environment while it is imported
        monkeypatch.setitem(sys.modules, name, module)
    if state is not None:
        assert RayJobs().status({"id": "toy-404"}) is state
        return
    with pytest.raises(PlaceError, match=f"the Ray cluster at http://127.0.0.1:8265: {answer}") as caught:
        RayJobs().status({"id": "toy-404"})
    assert isinstance(caught.value, ray_jobs._Away) == (" 500" in answer)
