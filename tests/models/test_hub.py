"""Files of the hub: fetched once by the processes of a node. The hub is a server of this test's on loopback, which counts."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gentrain.models.hub import files_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "unet/config.json": b"{}", "unet/net.safetensors": b"x" * 1000, "unet/net.fp16.safetensors": b"half", "unet/net.bin": b"pickle",
    "vae/config.json": b"{}",
}  # fmt: skip
FETCH = """
import logging, sys
from gentrain.models.hub import fetched, files_of
logging.basicConfig(stream=sys.stdout, format="%(message)s")
logging.getLogger("filelock").setLevel(logging.DEBUG)
print(fetched("some/model", None, *files_of("unet")))
"""


class Hub(ThreadingHTTPServer):
    """Serves a repository. `asked`: how often each was. While `held` is cleared, weights do not come."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: Counter[str] = Counter()
        self.held = threading.Event()
        self.held.set()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._file(with_body=False)

    def do_GET(self) -> None:
        if self.path.startswith("/api/"):
            self.server.asked["api"] += 1
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for name, data in FILES.items()
            ]
            listing: Any = entries if "/tree/" in self.path else {"id": "some/model", "sha": COMMIT, "siblings": []}
            self._answer(json.dumps(listing).encode(), {"Content-Type": "application/json"})
        else:
            self._file(with_body=True)

    def _file(self, with_body: bool) -> None:
        name = self.path.partition(f"/resolve/{COMMIT}/")[2]
        if name not in FILES:
            return self._answer(b"", {}, 404)
        if with_body:
            self.server.asked[name] += 1
            if name.endswith(".safetensors"):
                self.server.held.wait(60)
        data = FILES[name]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self._answer(data, headers, with_body=with_body)

    def _answer(self, data: bytes, headers: dict[str, str], status: int = 200, with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.held.set()
            server.shutdown()
            thread.join()


def _process(hub: Hub, home: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    return subprocess.Popen([sys.executable, "-c", FETCH], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _until(holds: Any) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _end(process: subprocess.Popen[str]) -> str:
    out, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    return out.splitlines()[-1]


def test_of_two_processes_one_fetches_and_the_other_waits_for_it(hub: Hub, tmp_path: Path) -> None:
    hub.held.clear()
    first = _process(hub, tmp_path)
    _until(lambda: hub.asked["unet/net.safetensors"])
    asked = hub.asked.copy()
    second = _process(hub, tmp_path)
    assert second.stdout is not None
    assert any("Timeout on acquiring lock" in line for line in second.stdout)  # it is held, and the process is about to wait
    hub.held.set()
    assert _end(first) == _end(second) == str(tmp_path / "hub" / "models--some--model" / "snapshots" / COMMIT)
    assert hub.asked == asked  # the second has asked nothing at all
    assert {name: count for name, count in asked.items() if name != "api"} == {"unet/config.json": 1, "unet/net.safetensors": 1}


def test_the_death_of_the_one_that_fetches_lets_the_next_one_go_on(hub: Hub, tmp_path: Path) -> None:
    hub.held.clear()
    first = _process(hub, tmp_path)
    _until(lambda: hub.asked["unet/net.safetensors"])
    second = _process(hub, tmp_path)
    assert second.stdout is not None
    assert any("Timeout on acquiring lock" in line for line in second.stdout)
    first.send_signal(signal.SIGKILL)
    first.wait()
    hub.held.set()
    folder = Path(_end(second))
    assert (folder / "unet/net.safetensors").read_bytes() == FILES["unet/net.safetensors"]
    assert hub.asked["unet/config.json"] == 1  # what was there is not fetched again
    first.communicate()


@pytest.mark.parametrize("variant, there", [(None, ["net.safetensors"]), ("fp16", ["net.fp16.safetensors"])])
def test_one_kind_of_weights_is_fetched(variant: str | None, there: list[str]) -> None:
    from huggingface_hub.utils import filter_repo_objects

    patterns, without = files_of("unet", variant)
    names = list(filter_repo_objects(FILES, allow_patterns=list(patterns), ignore_patterns=list(without)))
    assert names == ["unet/config.json", *(f"unet/{name}" for name in there)]
