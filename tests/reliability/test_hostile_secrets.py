"""A secret that a run uses is in nothing that it writes, says or shows to `ps`; and the code that could let strangers in is not there."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import gentrain

CANARY = "canary-5f0a93d2"
PLUGIN = Path(__file__).with_name("plugin_vault.py")
RECIPE = """
plugins: ['{plugin}']
stages:
  model:
    name: train
    run:
      method: flow_matching
      data: {{name: vault, token: '${{oc.env:VAULT_TOKEN}}', digest: {digest}}}
      model: {{name: unet, channels: [8, 8], attention: []}}
      engine: torch
      training: {{samples: 64, batch_size: 16, log_every: 16, preview_every: 32, preview_count: 10}}
  drawn: {{name: generate, run: '${{output:model}}', count: 150, sampler: {{name: euler, steps: 2}}}}
  scores: {{name: evaluate, data: '${{stages.model.run.data}}', samples: {{drawn: '${{output:drawn}}'}}}}
  pipeline: {{name: export, run: '${{output:model}}', scores: '${{output:scores}}'}}
"""


def _files_with(needle: bytes, folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and needle in path.read_bytes()]


def _watch(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str, set[str]]:
    """Exit status, output, and every argument of every process that the command started."""
    arguments: set[str] = set()
    with (folder / "log").open("w+") as log:
        process = psutil.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    for each in [process, *process.children(recursive=True)]:
                        arguments.update(each.cmdline())
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        return process.returncode, log.read(), arguments


@pytest.mark.timeout(300)
def test_a_secret_stays_in_the_environment(tmp_path: Path) -> None:
    digest = hashlib.sha256(CANARY.encode()).hexdigest()
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(plugin=PLUGIN, digest=digest))
    command = [sys.executable, "-c", "from gentrain.cli import main; main()", "run", "recipe.yaml"]
    environment = os.environ | {"VAULT_TOKEN": CANARY, "COLUMNS": "200"}
    status, said, arguments = _watch(command, tmp_path, environment)
    assert status == 0, said
    assert str(PLUGIN) in "".join(said.split()), "a plugin is named in the log"
    assert not [argument for argument in arguments if CANARY in argument]
    run = tmp_path / "runs" / "recipe"
    names = {path.name for path in run.rglob("*")}
    expected = {"config.yaml", "recipe.yaml", "stages.json", "report.html", "README.md", "environment.json", "metrics.json", "info.json"}
    assert names >= expected
    assert _files_with(CANARY.encode(), tmp_path) == [], "what was said included"
    for name in ("recipe.yaml", "stages.json", "report.html", "model/config.yaml", "pipeline/README.md"):
        assert "${oc.env:VAULT_TOKEN}" in (run / name).read_text(), name
    del environment["VAULT_TOKEN"]
    status, said, _ = _watch([*command, "stages.drawn.count=151"], tmp_path, environment)
    assert status == 2 and "the environment variable VAULT_TOKEN is not set" in " ".join(said.split())


SOURCES = sorted(Path(gentrain.__file__).parent.rglob("*.py"))
# what would run code out of data, in whatever module it is looked up
FORBIDDEN_CALLS = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "torch.jit.load", "joblib.load", "numpy.load", "np.load",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "shelve.open", "marshal.loads", "eval", "exec", "compile",
    "os.system", "os.popen", "__import__",
}  # fmt: skip
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
DYNAMIC_IMPORTS = {  # packages of components, and plugins; a package that is asked for by a constant; diffusers or transformers
    "gentrain/config.py": {"importlib.import_module", "importlib.util.spec_from_file_location", "importlib.util.module_from_spec"},
    "gentrain/data/base.py": {"importlib.import_module"},
    "gentrain/models/families/source.py": {"importlib.import_module"},
}
TENSORS_ONLY = {"gentrain/metrics/features.py"}  # published networks, which are in torch's format; weights_only=True


def _loads_tensors_only(call: ast.Call) -> bool:
    return any(word.arg == "weights_only" and isinstance(word.value, ast.Constant) and word.value.value is True for word in call.keywords)


def _reads_what_is_no_weights(call: ast.Call) -> bool:
    """Of from_pretrained: of a tokenizer or a configuration, or with options that are gathered elsewhere."""
    called = _dotted(call.func).lower()
    return "tokenizer" in called or "config" in called or any(word.arg is None for word in call.keywords)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def dangers(source: str, name: str) -> list[str]:
    """What a source does that could run code of strangers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [module for module in modules if module.partition(".")[0] in FORBIDDEN_IMPORTS]
            if isinstance(node, ast.ImportFrom):
                found += [full for alias in node.names if (full := f"{node.module}.{alias.name}") in FORBIDDEN_CALLS]
        elif isinstance(node, ast.Call):
            called = _dotted(node.func)
            called = f"importlib.{called}" if called == "import_module" else called
            if called in FORBIDDEN_CALLS and not (called == "torch.load" and name in TENSORS_ONLY and _loads_tensors_only(node)):
                found.append(called)
            if called.startswith("importlib.") and called != "importlib.util.find_spec" and not called.startswith("importlib.metadata."):
                found += [] if called in DYNAMIC_IMPORTS.get(name, ()) else [called]
            safe = any(word.arg == "use_safetensors" and getattr(word.value, "value", None) is True for word in node.keywords)
            if called.endswith("from_pretrained") and not safe and not _reads_what_is_no_weights(node):
                found.append(f"{called} without use_safetensors")
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if (keyword.arg, value) in {("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False), ("shell", True)}:
                    found.append(f"{called}({keyword.arg}={value})")
                if called.endswith("from_pretrained") and keyword.arg == "trust_remote_code" and value is not False:
                    found.append(f"{called}(trust_remote_code=...)")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from torch import load", "import torch\ntorch.load('x', weights_only=True)", "import numpy as np\nnp.load('x')",
        "yaml.load(text, Loader=yaml.Loader)", "eval('1')", "f(trust_remote_code=True)", "np.loadtxt(a, allow_pickle=True)",
        "subprocess.run('ls', shell=True)", "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module\nimport_module(name)",
        "g(weights_only=False)",
        "x.from_pretrained('a', use_safetensors=True, trust_remote_code=trust)",
        "x.from_pretrained('a')",
        "x.from_pretrained('a', use_safetensors=safe)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert dangers(source, "gentrain/elsewhere.py")


def test_the_search_finds_a_load_of_more_than_tensors() -> None:
    assert dangers("torch.load('x')", *TENSORS_ONLY) == ["torch.load"]
    assert dangers("torch.load('x', weights_only=True)", *TENSORS_ONLY) == []


def test_nothing_unpickles_evaluates_or_imports_what_a_file_says() -> None:
    assert len(SOURCES) > 60
    root = Path(gentrain.__file__).parents[1]
    found = {str(path.relative_to(root)): dangers(path.read_text(), str(path.relative_to(root))) for path in SOURCES}
    assert {name: what for name, what in found.items() if what} == {}
