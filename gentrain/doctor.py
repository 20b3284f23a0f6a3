"""What a machine offers gentrain and what would go wrong on it. Reads package metadata, so nothing heavier than torch is imported."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

MAIN_PACKAGES = ("torch", "deepspeed", "ray", "diffusers", "transformers")
RAY_PORTS = {6379: "cluster", 8265: "dashboard", 10001: "client"}
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One thing looked at. `remedy` is empty exactly when `status` is "ok"."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""


def checks(directory: Path = Path("runs")) -> list[Check]:
    """Everything `gentrain doctor` prints; `directory` is where runs would be written."""
    return [
        _python(),
        *_packages(),
        _torchvision(),
        _accelerator(),
        _compiler(),
        _loopback(),
        _host_name(),
        _ray_ports(),
        _threads(),
        _memory(),
        _shared_memory(),
        _disk(directory),
        _write_access(directory),
        _hub(),
    ]


def environment() -> dict[str, str]:
    """Versions and machine: kept with a run from its start, for the report."""
    versions = {name: _version(name) for name in ("gentrain", *MAIN_PACKAGES)} | {"commit": _commit()}
    return {
        "python": platform.python_version(),
        **{name: version for name, version in versions.items() if version is not None},
        "system": platform.platform(),
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "memory": f"{psutil.virtual_memory().total / GIB:.0f} GiB",
        "accelerator": _accelerator().detail,
    }


def _commit() -> str | None:
    """Of the checkout that this gentrain runs from; None where it runs from none."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"}, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _python() -> Check:
    supported = SpecifierSet(importlib.metadata.metadata("gentrain")["Requires-Python"])
    version = platform.python_version()
    if supported.contains(version, prereleases=True):
        return Check("python", "ok", f"{version} in {sys.prefix}")
    return Check("python", "fail", f"{version}, supported: {supported}", "make the environment anew: make PYTHON=python3.11 venv")


def _packages() -> list[Check]:
    """One check per main package, and one for all others that gentrain needs."""
    results, wrong = [], []
    requirements = [Requirement(line) for line in importlib.metadata.requires("gentrain") or []]
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        version = _version(requirement.name)
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        if requirement.name not in MAIN_PACKAGES:
            wrong += [] if fits else [f"{requirement.name} {version or 'missing'} (needs {requirement.specifier})"]
        elif fits:
            results.append(Check(requirement.name, "ok", f"{version} (supported: {requirement.specifier})"))
        else:
            remedy = f"pip install -c constraints.txt '{requirement}'"
            results.append(Check(requirement.name, "fail", f"{version or 'missing'}, supported: {requirement.specifier}", remedy))
    if wrong:
        return [*results, Check("other packages", "fail", ", ".join(wrong), "pip install -c constraints.txt -e .")]
    return [*results, Check("other packages", "ok", f"{len(requirements) - len(results)} within their supported ranges")]


def _torchvision() -> Check:
    version = _version("torchvision")
    if version is None:
        return Check("torchvision", "ok", "absent, as it must be")
    return Check(
        "torchvision", "fail", f"{version} is installed; it breaks imports of diffusers and transformers", "pip uninstall torchvision"
    )


def _accelerator() -> Check:
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return Check("accelerator", "ok", ", ".join(f"{device.name} ({device.total_memory / GIB:.0f} GiB)" for device in devices))
    if shutil.which("nvidia-smi"):
        remedy = "install the torch build for the driver's CUDA version (pytorch.org/get-started)"
        return Check("accelerator", "warn", f"the machine has NVIDIA tools, but torch {torch.__version__} sees no device", remedy)
    return Check("accelerator", "ok", "none; training runs on the CPU")


def _compiler() -> Check:
    """DeepSpeed compiles its own optimisers on first use; torch's, gentrain's default, need no compiler."""
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = {tool: shutil.which(tool, path=scripts) for tool in (os.environ.get("CXX", "c++"), "ninja")}
    missing = [tool for tool, path in found.items() if path is None]
    if missing:
        remedy = "only DeepSpeed's own optimisers need them: apt-get install g++ and pip install ninja, or keep torch's optimisers"
        return Check("compiler", "warn", f"missing: {', '.join(missing)}", remedy)
    return Check("compiler", "ok", ", ".join(f"{path}" for path in found.values()))


def _loopback() -> Check:
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            return Check("loopback", "ok", "127.0.0.1 accepts listeners")
    except OSError as error:
        return Check("loopback", "fail", f"cannot listen on 127.0.0.1: {error}", "workers talk over it: bring the interface `lo` up")


def _host_name() -> Check:
    name = socket.gethostname()
    try:
        return Check("host name", "ok", f"{name} is {socket.gethostbyname(name)}")
    except OSError:
        return Check("host name", "warn", f"{name} does not resolve, so gloo cannot pick an interface", "export GLOO_SOCKET_IFNAME=lo")


def _ray_ports() -> Check:
    taken = []
    for port, use in RAY_PORTS.items():
        with socket.socket() as probe:
            probe.settimeout(0.2)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                taken.append(f"{port} ({use})")
    if taken:
        remedy = "if that is a Ray cluster you no longer use, stop it: ray stop"
        return Check("Ray's ports", "warn", f"in use: {', '.join(taken)}", remedy)
    return Check("Ray's ports", "ok", f"free: {', '.join(map(str, RAY_PORTS))}")


def _threads() -> Check:
    threads, cores = os.environ.get("OMP_NUM_THREADS"), os.cpu_count() or 1
    if threads is None:
        remedy = "several workers on this machine: export OMP_NUM_THREADS=1"
        return Check("threads", "warn", f"OMP_NUM_THREADS is not set: each process uses all {cores} cores", remedy)
    return Check("threads", "ok", f"OMP_NUM_THREADS={threads}, {cores} cores")


def _memory() -> Check:
    free = psutil.virtual_memory().available / GIB
    if free < 4:
        return Check(
            "memory",
            "warn",
            f"{free:.1f} GiB available",
            "Ray and two workers take about 3 GiB: end other programs, or use the inline runner",
        )
    return Check("memory", "ok", f"{free:.0f} GiB available")


def _shared_memory() -> Check:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Check("shared memory", "ok", "this system has no /dev/shm")
    free = shutil.disk_usage(path).free / GIB
    if free < 1:
        return Check("shared memory", "warn", f"{free:.2f} GiB free in {path}", "in a container: docker run --shm-size=2g")
    return Check("shared memory", "ok", f"{free:.0f} GiB free in {path}")


def _existing(directory: Path) -> Path:
    """The directory, or the nearest parent that exists."""
    directory = directory.resolve()
    return next(path for path in (directory, *directory.parents) if path.exists())


def _disk(directory: Path) -> Check:
    free = shutil.disk_usage(_existing(directory)).free / GIB
    detail = f"{free:.1f} GiB free for {directory}"
    if free < 5:
        return Check(
            "disk", "fail" if free < 0.5 else "warn", detail, "checkpoints are kept there: free some space, or write to another disk"
        )
    return Check("disk", "ok", detail)


def _write_access(directory: Path) -> Check:
    place = _existing(directory)
    try:
        with tempfile.NamedTemporaryFile(dir=place):
            return Check("write access", "ok", f"{place} can be written")
    except OSError as error:
        return Check(
            "write access", "fail", f"cannot write in {place}: {error.strerror}", "change its owner, or write runs to another directory"
        )


def _hub() -> Check:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Check("Hugging Face hub", "ok", "offline: only models on this machine can be used")
    return Check("Hugging Face hub", "ok", "online: pretrained models may be fetched (HF_HUB_OFFLINE=1 forbids it)")
