"""What `gentrain doctor` finds, and that every fault comes with its remedy."""

from __future__ import annotations

import importlib.metadata
import shutil
import socket
import subprocess
from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from gentrain import doctor
from gentrain.doctor import Check, checks


def find(name: str, directory: Path = Path("runs")) -> Check:
    (check,) = [check for check in checks(directory) if check.name == name]
    return check


def pretend_versions(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name not in versions:
            return real(name)
        if versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return str(versions[name])

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_the_test_environment_itself_is_sound(tmp_path: Path) -> None:
    assert [check for check in checks(tmp_path) if check.status == "fail"] == []


def test_a_remedy_comes_with_every_fault_and_only_then(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_versions(monkeypatch, torch="2.9.0", ray=None, torchvision="0.24", numpy="1.0")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = checks(tmp_path)
    assert {check.status for check in found} == {"ok", "warn", "fail"}
    for check in found:
        assert check.detail
        assert bool(check.remedy) == (check.status != "ok"), check


def test_versions_are_held_against_the_supported_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_versions(monkeypatch, torch="2.9.0", ray=None, deepspeed="0.19.9", numpy="1.0", scipy=None)
    assert find("torch").status == "fail"
    assert "2.9.0" in find("torch").detail
    assert "torch" in find("torch").remedy
    assert (find("ray").status, find("ray").detail.split(",")[0]) == ("fail", "missing")
    assert find("deepspeed").status == "ok"
    others = find("other packages")
    assert others.status == "fail"
    assert "numpy 1.0 (needs" in others.detail
    assert "scipy missing" in others.detail


def test_a_local_build_of_torch_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_versions(monkeypatch, torch="2.13.0+cu130")
    assert find("torch").status == "ok"


def test_torchvision_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("torchvision").status == "ok"
    pretend_versions(monkeypatch, torchvision="0.28.0")
    assert find("torchvision").remedy == "pip uninstall torchvision"


def test_an_unsupported_python_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.14.0")
    assert find("python").status == "fail"


def test_compiler_and_ninja(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert find("compiler").detail == "missing: c++, ninja"
    for tool in ("c++", "ninja"):
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    assert find("compiler").status == "ok"


def test_ports_of_a_running_ray_cluster_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setattr(doctor, "RAY_PORTS", {port: "dashboard"})
        assert find("Ray's ports").detail == f"in use: {port} (dashboard)"
    assert find("Ray's ports").status == "ok"


def test_loopback_and_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("no such device")

    monkeypatch.setattr(doctor.socket, "gethostbyname", fail)
    assert find("host name").remedy == "export GLOO_SOCKET_IFNAME=lo"
    monkeypatch.setattr(socket.socket, "bind", fail)
    assert "no such device" in find("loopback").detail


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert find("threads").status == "warn"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert find("threads").status == "ok"


@pytest.mark.parametrize("gib, disk", [(0.1, "fail"), (2, "warn"), (50, "ok")])
def test_disk_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gib: float, disk: str) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, int(gib * 2**30)))
    assert find("disk", tmp_path / "not" / "yet" / "there").status == disk


@pytest.mark.parametrize("gib, status", [(2, "warn"), (8, "ok")])
def test_memory(monkeypatch: pytest.MonkeyPatch, gib: int, status: str) -> None:
    memory = namedtuple("memory", "total available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(gib * 2**30, gib * 2**30))
    assert find("memory").status == status


def test_write_access(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find("write access", tmp_path / "runs").status == "ok"
    assert not (tmp_path / "runs").exists(), "looking leaves nothing behind"

    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    assert find("write access", tmp_path).detail == f"cannot write in {tmp_path}: Permission denied"


@pytest.mark.parametrize("value, word", [("1", "offline"), ("", "online")])
def test_hub(monkeypatch: pytest.MonkeyPatch, value: str, word: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert find("Hugging Face hub").detail.startswith(word)


def test_environment_names_what_a_result_depends_on() -> None:
    environment = doctor.environment()
    assert environment["torch"] == importlib.metadata.version("torch")
    expected = {"python", "gentrain", *doctor.MAIN_PACKAGES, "system", "processor", "memory", "accelerator"}
    assert set(environment) - {"commit"} == expected
    assert all(environment.values())


def test_the_commit_is_that_of_gentrains_own_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not that of a project which has gentrain somewhere in its environment."""
    package = tmp_path / "checkout" / "gentrain"
    package.mkdir(parents=True)
    monkeypatch.setattr(doctor, "__file__", str(package / "doctor.py"))

    def git(where: Path, *arguments: str) -> str:
        command = ["git", "-C", str(where), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git(tmp_path, "init", "--quiet", ".")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "-m", "the project's")
    assert "commit" not in doctor.environment()
    git(package.parent, "init", "--quiet", ".")
    (package / "a.py").write_text("1\n")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "--quiet", "-m", "gentrain's")
    assert doctor.environment()["commit"] == git(package.parent, "rev-parse", "HEAD")[:12]
    (package / "a.py").write_text("2\n")
    assert doctor.environment()["commit"].endswith("-dirty")
