"""docker/Dockerfile.cpu without a container engine: its instructions are carried out in fresh roots of Debian, one per stage.

The base image is replaced by what debootstrap makes with Debian's own Python, so that its version differs in the last number. Needs root,
debootstrap, a mirror of Debian and an index of packages. pip is configured as on this machine.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.gates.results import ROOT

pytestmark = [
    pytest.mark.gate,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(os.geteuid() != 0, reason="chroot and mounts need root"),
    pytest.mark.skipif(shutil.which("debootstrap") is None, reason="debootstrap is not installed"),
]

MIRROR = "http://deb.debian.org/debian"
IMPORT_ALL = """import gentrain, importlib, pkgutil
for module in pkgutil.walk_packages(gentrain.__path__, "gentrain."):
    importlib.import_module(module.name)"""
PIP = ("PIP_CERT", "PIP_FIND_LINKS", "PIP_CONSTRAINT", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")


@dataclass
class Stage:
    """A root in the making, and what the instructions so far have set."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root"})
    directory: str = "/"
    user: str = "0:0"

    def run(self, command: str, **further: str) -> subprocess.CompletedProcess[str]:
        """`/bin/sh -c COMMAND` in the root, with mounts that end with it. pip finds what it finds on this machine."""
        mounts = [f"mount -t proc proc {self.root}/proc", f"mount -t tmpfs -o mode=1777 tmpfs {self.root}/dev/shm"]
        for directory in _pip_directories():
            (self.root / directory.relative_to("/")).mkdir(parents=True, exist_ok=True)
            mounts.append(f"mount --bind {directory} {self.root / directory.relative_to('/')}")
        pip = {name: os.environ[name] for name in PIP if name in os.environ} | {"PIP_RETRIES": "0"}
        values = [f"{name}={value}" for name, value in (pip | self.environment | further).items()]
        inner = shlex.join(["env", "-i", *values, "sh", "-c", f"cd {shlex.quote(self.directory)} && {{ {command}\n}}"])
        script = " && ".join([*mounts, f"exec chroot --userspec={self.user} {self.root} {inner}"])
        return subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True)


def _pip_directories() -> list[Path]:
    """Of this machine's packages, where pip's configuration names any."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    names = {Path(re.sub("^file://", "", word)) for word in listed.replace("'", " ").split()}
    roots = {Path(*name.parts[:3]) for name in names if name.is_absolute() and name.is_dir()}
    return sorted(roots)


def _instructions(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [tuple(part.split(None, 1)) for part in "\n".join(lines).replace("\\\n", " ").splitlines()]  # type: ignore[misc]


def _copy(stage: Stage, stages: dict[str, Stage], words: list[str]) -> None:
    options = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
    *sources, target = [word for word in words if not word.startswith("--")]
    source_root = stages[options["from"]].root if "from" in options else ROOT
    destination = stage.root / os.path.join(stage.directory, target).lstrip("/")
    for source in sources:
        path = source_root / source.lstrip("/")
        if path.is_dir():
            subprocess.run(["cp", "-a", f"{path}/.", str(_made(destination))], check=True)
        else:
            shutil.copy(path, _made(destination) if target.endswith("/") else destination)
    if "chown" in options:
        subprocess.run(["chown", "-R", options["chown"], str(destination)], check=True)


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _begin(base: Path, folder: Path, stages: dict[str, Stage], arguments: str) -> Stage:
    image, _, name = arguments.partition(" AS ")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", image), "every base is pinned"
    stage = stages[name] = Stage(folder / (name or "final"))
    subprocess.run(["cp", "-a", str(base), str(stage.root)], check=True)
    return stage


def build(dockerfile: Path, base: Path, folder: Path) -> tuple[Stage, dict[str, list[str]]]:
    """Carries the instructions out. The last stage; HEALTHCHECK, ENTRYPOINT and CMD as lists of words."""
    stages: dict[str, Stage] = {}
    stage: Any = None
    starts: dict[str, list[str]] = {}
    for name, arguments in _instructions(dockerfile.read_text()):
        if name == "FROM":
            stage = _begin(base, folder, stages, arguments)
        elif name == "ENV":
            expanded = arguments.replace("$PATH", stage.environment["PATH"])
            stage.environment |= dict(word.split("=", 1) for word in shlex.split(expanded))
        elif name == "WORKDIR":
            stage.directory = arguments
            _made(stage.root / arguments.lstrip("/"))
        elif name == "USER":
            stage.user = arguments
            stage.environment["HOME"] = "/home/gentrain"
        elif name == "COPY":
            _copy(stage, stages, shlex.split(arguments))
        elif name == "RUN":
            done = stage.run(arguments)
            assert done.returncode == 0, f"{arguments}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        elif name in ("HEALTHCHECK", "ENTRYPOINT", "CMD"):
            starts[name] = json.loads(arguments[arguments.index("[") :])
        else:
            raise AssertionError(f"no way to carry out {name}")
    return stage, starts


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for python:3.11-slim-bookworm."""
    root = tmp_path_factory.mktemp("base") / "root"
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm", str(root), MIRROR],
        capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    (root / "usr/bin/python").symlink_to("python3")
    subprocess.run(["chroot", str(root), "apt-get", "clean"], check=True)
    (root / "etc/apt/apt.conf.d/clean").write_text('APT::Keep-Downloaded-Packages "false";\nDir::Cache::pkgcache "";\n')  # as images do
    for name in ("/etc/resolv.conf", os.environ.get("PIP_CERT", ""), "/etc/pip.conf"):
        if name and Path(name).is_file():
            shutil.copy(name, root / name.lstrip("/"))
    return root


def _size_mib(path: Path) -> int:
    return int(subprocess.run(["du", "-sm", "-x", str(path)], capture_output=True, text=True, check=True).stdout.split()[0])


def test_the_cpu_image(base: Path, tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    image, starts = build(ROOT / "docker" / "Dockerfile.cpu", base, tmp_path)
    record_property("MiB of the base", _size_mib(base))
    record_property("MiB of the image", _size_mib(image.root))
    record_property("MiB of /venv in it", _size_mib(image.root / "venv"))
    assert image.user == "1000:1000" and not (image.root / "source").exists()
    assert image.run("id -u").stdout.strip() == "1000" and image.run("touch /venv/x /usr/x").returncode != 0
    health = image.run(shlex.join(starts["HEALTHCHECK"]))
    assert health.returncode == 0, health.stdout
    told = image.run(shlex.join([*starts["ENTRYPOINT"], "--version"]))
    assert told.stdout.startswith("gentrain "), told.stderr
    trained = image.run(f"{shlex.join(starts['ENTRYPOINT'])} train configs/spiral/edm.yaml training.samples=2560")
    assert trained.returncode == 0 and "trained: runs/edm" in trained.stdout, trained.stderr
    imported = image.run(f"python -c {shlex.quote(IMPORT_ALL)}")  # nothing that was taken out of the environment is missed
    assert imported.returncode == 0, imported.stderr
    frozen = image.run("/venv/bin/pip list --format=freeze").stdout
    pinned = {_normal(line) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    installed = {_normal(line) for line in frozen.splitlines() if not line.startswith("gentrain==")}
    assert len(installed) > 50 and installed <= pinned, installed - pinned
    homes = subprocess.run(["grep", "-rlF", str(ROOT), str(image.root / "venv"), str(image.root / "home")], capture_output=True, text=True)
    assert homes.stdout == ""


def _normal(line: str) -> str:
    name, _, version = line.partition("==")
    return f"{re.sub('[-_.]+', '-', name).lower()}=={version.partition('+')[0]}"
