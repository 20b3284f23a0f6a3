"""Runs a gate and keeps its result in docs/gates.json; lists the gates whose result is missing, failed or older than the code.

A gate is test_<topic>.py with the files test_<topic>_<part>.py beside it.
A result is stale when a file of gentrain that the gate had imported, the gate itself, or one of WATCHED has changed since. A gate that
starts other processes therefore imports what they run at its top. Numbers reach the result through pytest's `record_property(name, value)`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "gates.json"
# Topic -> what its gate reads without importing it.
WATCHED = {"containers": ("docker/Dockerfile.cpu", "constraints.txt", "pyproject.toml", "gentrain/doctor.py", "configs/spiral/edm.yaml")}
LIMIT_S = 3600  # of one gate: what takes longer is split into topics


class Record:
    """A pytest plugin that gathers the outcome and the recorded numbers of every test."""

    def __init__(self) -> None:
        self.passed, self.failed = 0, 0
        self.numbers: dict[str, Any] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        self.failed += report.failed
        if report.when == "teardown":
            name = report.nodeid.partition("::")[2]
            self.numbers.update({f"{name} {key}": value for key, value in report.user_properties})


def _fingerprint(files: list[str]) -> str:
    """Of the contents; a file that is gone counts as changed."""
    digest = hashlib.sha256()
    for name in files:
        path = ROOT / name
        digest.update(name.encode() + b"\0" + (path.read_bytes() if path.is_file() else b"") + b"\0")
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _read() -> dict[str, dict[str, Any]]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def _topics() -> dict[str, list[Path]]:
    """Topic -> its files."""
    topics: dict[str, list[Path]] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py"), key=lambda path: path.stem):
        name = path.stem.removeprefix("test_")
        topics.setdefault(next((topic for topic in topics if name.startswith(f"{topic}_")), name), []).append(path)
    return topics


def run(topic: str) -> int:
    topic = topic.replace("-", "_")  # few-step is few_step
    tests = _topics().get(topic)
    if tests is None:
        print(f"no gate is called {topic!r}; gates: {', '.join(_topics())}", file=sys.stderr)
        return 2
    record, started = Record(), time.monotonic()
    status = pytest.main(["-m", "gate", f"--timeout={LIMIT_S}", *map(str, tests)], plugins=[record])
    loaded = {Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    imported = (str(path.relative_to(ROOT)) for path in {*tests, *loaded} if path.is_relative_to(ROOT / "gentrain") or path in tests)
    files = sorted({*imported, *WATCHED.get(topic, ())})
    results = _read()
    results[topic] = {
        "result": "passed" if status == 0 and record.passed else "failed",
        "tests": {"passed": record.passed, "failed": record.failed},
        "numbers": record.numbers,
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else ""),
        "command": f"make gates-{topic}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(time.monotonic() - started, 1),
        "date": time.strftime("%Y-%m-%d"),
        "files": files,
        "fingerprint": _fingerprint(files),
    }
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    return int(status)


def status() -> int:
    """Prints one line per gate; 1 when any is not up to date."""
    results, behind = _read(), 0
    for topic in _topics():
        entry = results.get(topic)
        current = False
        if entry is None:
            state = "never run"
        elif entry["result"] != "passed":
            state = f"failed at {entry['commit']}"
        elif _fingerprint(entry["files"]) != entry["fingerprint"]:
            state = f"stale: passed at {entry['commit']}, its code has changed since"
        else:
            current, state = True, f"passed at {entry['commit']} in {entry['seconds']:.0f} s"
        behind += not current
        print(f"{topic:24} {state}")
    return int(behind > 0)


if __name__ == "__main__":
    sys.exit(run(sys.argv[2]) if sys.argv[1] == "run" else status())
