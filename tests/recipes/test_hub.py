"""What was exported goes to the hub: what a dry run tells, and what the hub's own client sends to a server that stands in for the hub."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from gentrain.config import ConfigError, Document, build
from gentrain.recipes.export import Export
from gentrain.recipes.hub import Push, as_repository
from gentrain.training.loop import train
from gentrain.training.run import save_config
from tests.distributed.cases import run_of, values
from tests.models.test_partial import ALONE

SECRET = "hf_" + "secret" * 6


class Hub(ThreadingHTTPServer):
    """Answers as the hub does to what `HfApi` asks of it, keeps what it was sent, and refuses the paths that `refused` begins."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[tuple[str, str, Any]] = []
        self.tokens: set[str | None] = set()
        self.files: dict[str, bytes] = {}
        self.refused: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.tokens.add(self.headers.get("Authorization"))
        lines = [json.loads(line) for line in body.decode().splitlines()] if "ndjson" in self.headers.get("Content-Type", "") else []
        asked = lines or (json.loads(body) if body else None)
        self.server.asked.append((self.command, self.path, asked))
        status = next((code for start, code in self.server.refused.items() if self.path.startswith(start)), 200)
        self._say(status, self._content(asked) if status == 200 else {"error": "no right to write"})

    do_GET = do_POST

    def _content(self, asked: Any) -> Any:
        if "/preupload/" in self.path:
            return {"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked["files"]]}
        if "/commit/" in self.path:
            self.server.files |= {
                each["value"]["path"]: base64.b64decode(each["value"]["content"]) for each in asked if each["key"] == "file"
            }
            return {"commitUrl": f"{self.server.url}/ada/flowers/commit/1", "commitOid": "1" * 40, "success": True, "pullRequestUrl": None}
        return {"url": f"{self.server.url}/ada/flowers", "id": "ada/flowers", "sha": "0" * 40, "siblings": []}

    def _say(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None: ...


def at(endpoint: str) -> Any:
    """The hub's client, for a hub elsewhere."""

    class Api(huggingface_hub.HfApi):
        def __init__(self, **given: Any):
            super().__init__(endpoint=endpoint, **given)

    return Api


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback, a token in the environment, and another one stored where the client looks for it by itself."""
    from huggingface_hub import constants

    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub, "HfApi", at(server.url))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made") / "flowers"
    (directory / "unet").mkdir(parents=True)
    (directory / "README.md").write_text("# flowers\n")
    (directory / "unet" / "weights.safetensors").write_bytes(bytes(range(256)) * 9)
    return directory


def test_a_dry_run_tells_what_would_be_sent_and_asks_nothing(exported: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    push = Push("ada/flowers", revision="trial", private=True, dry_run=True)
    push.check()
    assert list(push.send(exported)) == [
        "would send 2 files, 2.31 kB, to ada/flowers, branch trial (private if it is new):",
        "  README.md  10 bytes",
        "  unet/weights.safetensors  2.3 kB",
    ]
    assert next(iter(Push("ada/flowers", dry_run=True).send(exported))).endswith("to ada/flowers, branch main:")
    assert not hub.asked


def test_the_directory_is_committed_to_the_repository_and_branch(exported: Path, hub: Hub) -> None:
    told = list(Push("ada/flowers", revision="trial", private=True).send(exported))
    assert told == [f"sent 2 files, 2.31 kB: {hub.url}/ada/flowers/commit/1"]
    assert hub.files == {path.relative_to(exported).as_posix(): path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    made = [(path, asked) for method, path, asked in hub.asked if method == "POST"]
    assert made[0][0] == "/api/repos/create" and made[0][1]["visibility"] == "private"
    assert made[0][1]["name"] == "flowers" and made[0][1]["organization"] == "ada"
    assert made[1][0] == "/api/models/ada/flowers/branch/trial"
    assert made[-1][0] == "/api/models/ada/flowers/commit/trial"
    assert hub.tokens == {f"Bearer {SECRET}"}


def test_main_is_committed_to_unless_said_otherwise(exported: Path, hub: Hub) -> None:
    list(Push("ada/flowers").send(exported))
    paths = [path for method, path, _ in hub.asked if method == "POST"]
    assert paths[-1] == "/api/models/ada/flowers/commit/main" and not any("/branch/" in path for path in paths)
    assert "visibility" not in hub.asked[0][2]


@pytest.mark.parametrize("refused", ["/api/repos/create", "/api/models/ada/flowers/commit"])
def test_a_refusal_tells_how_to_send_again_and_hides_the_token(exported: Path, hub: Hub, refused: str) -> None:
    hub.refused |= {refused: 403, **({"/api/models/ada/flowers": 403} if "create" in refused else {})}
    with pytest.raises(RuntimeError) as error:
        list(Push("ada/flowers", revision="trial").send(exported))
    assert f"{exported} is complete, but ada/flowers did not take it: " in str(error.value) and "403" in str(error.value)
    assert str(error.value).endswith(f"once that is mended: hf upload ada/flowers {exported} --revision trial")
    assert SECRET not in str(error.value)


def test_a_hub_that_is_out_of_reach_is_told(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", at("http://127.0.0.1:9"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(RuntimeError, match=r"ada/flowers did not take it: .* hf upload ada/flowers"):
        list(Push("ada/flowers").send(exported))


def test_what_is_bound_to_fail_is_refused_before_anything_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Export(run=str(tmp_path / "none"), push=Push("ada/flowers"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"push: no token: export HF_TOKEN"):
        stage.write(tmp_path / "out")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"push: .*HF_HUB_OFFLINE is set"):
        stage.write(tmp_path / "out")
    for name, message in (
        ("flowers", "does not say whose it is; write OWNER/NAME"),
        ("a/b/c", "names no repository"),
        ("a/-b", "names no"),
    ):
        with pytest.raises(ConfigError, match=f"push.repository: .*{message}"):
            build(Export, Document({"run": "x", "push": {"repository": name}}, "test"))


def test_an_exported_run_and_its_card_are_what_is_sent(tmp_path: Path, hub: Hub) -> None:
    settings = values(tmp_path / "run", "flow_matching", samples=12) | {"data": {"name": "mnist5k"}}
    run = run_of(settings | {"model": {"name": "unet", "channels": [8, 16], "attention_head_dim": 8, "norm_groups": 4}})
    save_config(run)
    train(run, ALONE, lambda: False)
    stage = Export(run=str(run.directory), push=Push("ada/digits"))
    stage.execute(tmp_path / "recipe" / "out")
    assert {"README.md", "model_index.json", "network/diffusion_pytorch_model.safetensors"} <= hub.files.keys()
    card = hub.files["README.md"].decode()
    assert 'from_pretrained("ada/digits", trust_remote_code=True)' in card and "`ada/digits` is this repository." in card
    assert '"out"' not in card and SECRET not in card


def test_a_card_is_left_as_it_is_but_for_where_to_load_it_from() -> None:
    card = '# out\nReplace `out` by the path of this directory. Needs torch.\nload("out") # without\n'
    assert as_repository(card, "out", "a/b") == '# out\n`a/b` is this repository. Needs torch.\nload("a/b") # without\n'
