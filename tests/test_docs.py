"""Every block of code in the documents is one that gentrain takes: configurations build, commands parse, Python's imports exist.

What a page leaves out of a configuration comes from a small base, what it only invents is stood in for below.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from gentrain import cli
from gentrain.cluster.sweeps import Sweep, is_sweep, load_sweep
from gentrain.config import ConfigError, build, load, option
from gentrain.data.base import Data
from gentrain.document import Document
from gentrain.recipes.base import RecipeConfig, is_recipe, load_recipe
from gentrain.training.run import RunConfig, load_run
from tests.models.pipelines import stable_diffusion

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "CONTRIBUTING.md"  # has a test of its own
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "launch").rglob("*.md")]
BASE: dict[str, Any] = {"method": "flow_matching", "data": "checkerboard", "model": "mlp", "training": {"samples": 64}}
VARIABLES = {"BUCKET_TOKEN": "t"}  # that pages read
NAMES = {"CONFIG": "configs/mnist5k/flow_matching.yaml", "RECIPE": "configs/quickstart.yaml"}  # what capitals stand for
PRETRAINED = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # out of reach here
TOOLS = {"pip", "ray", "export", ".", ".ci/run", "pre-commit", "torchrun", "docker", "kubectl", "pytest"}  # commands of others

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(*languages: str) -> list[object]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            line = text[: match.start()].count("\n") + 1
            if match[1] in languages and (page != EXAMPLE or match[1] == "sh"):
                found.append(pytest.param(match[2], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository's root, the variables that pages read, and the data sets of one's own that pages speak of."""

    @dataclasses.dataclass
    class MyBucket(Data):
        token: str = option("", "how to get in")

    @dataclasses.dataclass
    class Soil(Data):
        path: str = option("", "a table")

    monkeypatch.chdir(ROOT)
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    Data.available()
    for name, stand_in in {"my_bucket": MyBucket, "soil": Soil}.items():
        stand_in.registered_name = name
        monkeypatch.setitem(Data._registry, name, stand_in)


def check_configuration(text: str, directory: Path) -> None:
    """Builds what the text configures, key by key: whether the keys fit each other depends on what the page leaves out."""
    snippet = directory / "snippet.yaml"
    if PRETRAINED in text:
        text = text.replace(PRETRAINED, str(stable_diffusion(directory / "pipeline")))
    snippet.write_text(re.sub(r"^( *\.\.\.|\w+: \.\.\. .*)$", "", text, flags=re.MULTILINE))  # "..." stands for more
    (directory / "mnist5k").symlink_to(ROOT / "configs" / "mnist5k")
    document = load(snippet, (), {"output": "runs/snippet"})
    runs = [stage["run"] for stage in document.values.get("stages", {}).values() if isinstance(stage.get("run"), dict)]
    for run in runs:
        check_keys(RunConfig, Document(run, str(snippet), {}))
        run.update(BASE | run)
    if "stages" in document.values:
        build(RecipeConfig, document)
    elif "sweep" in document.values:
        build(Sweep, document.section("sweep"))
    else:
        check_keys(RunConfig, document)


def check_keys(schema: type, document: Document) -> None:
    hints = typing.get_type_hints(schema, include_extras=True)
    for key, value in document.values.items():
        part = dataclasses.make_dataclass("Part", [(key, hints[key])]) if key in hints else schema  # which complains about the key
        value = {**BASE[key], **value} if isinstance(value, dict) and isinstance(BASE.get(key), dict) else value
        build(part, Document({key: value}, document.file, document.origins))


@pytest.mark.parametrize("text", blocks("yaml"))
def test_a_configuration_builds(text: str, tmp_path: Path) -> None:
    check_configuration(text, tmp_path)


def test_a_mistake_in_a_configuration_is_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        check_configuration("sampler: {name: heun, stops: 3}\n", tmp_path)


def commands(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        for command in re.split(r"&&|\|", re.sub(r"(^|\s)#.*", "", line)):
            words = shlex.split(command)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]
            if words:
                yield [NAMES.get(word, word) for word in words]


def check_command(words: list[str]) -> None:
    tool, *arguments = words
    if tool == "torchrun":
        tool, *arguments = words[words.index("--no-python") + 1 :]
    if tool == "make":
        targets = re.findall(r"^([\w%-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert not arguments or any(re.fullmatch(target.replace("%", ".+"), arguments[0]) for target in targets), words
    elif tool == "gentrain":
        check_gentrain(arguments)
    else:
        tool = arguments[0] if tool == "python" else tool
        assert tool in TOOLS or (ROOT / tool).is_file(), f"unknown command: {shlex.join(words)}"


def check_gentrain(arguments: list[str]) -> None:
    group = typer.main.get_command(cli.app)
    with group.make_context("gentrain", list(arguments), resilient_parsing=True) as context:
        command = group.get_command(context, arguments[0])  # type: ignore[attr-defined]
        assert command is not None, f"gentrain has no command {arguments[0]}"
        with command.make_context(
            arguments[0], arguments[1:], parent=context, resilient_parsing=False
        ) as inner:  # complains about options and missing arguments; starts nothing
            given = inner.params
    files = [value for value in given.values() if isinstance(value, Path) and value.suffix == ".yaml"]
    for file in files:
        if file.parts[0] == "configs":  # others are the reader's own
            overrides = given.get("overrides") or []
            (load_sweep if is_sweep(file) else load_recipe if is_recipe(file) else load_run)(file, overrides)


@pytest.mark.parametrize("text", blocks("sh"))
def test_a_command_parses(text: str) -> None:
    for words in commands(text):
        check_command(words)


@pytest.mark.parametrize(
    "line",
    ["gentrain trian configs/quickstart.yaml", "gentrain run configs/quickstart.yaml stages.generator.runn=1", "make demmo", "gentrian"],
)
def test_a_mistake_in_a_command_is_found(line: str) -> None:
    (words,) = commands(line)
    with pytest.raises((AssertionError, ConfigError, typer.TyperException)):
        check_command(words)


@pytest.mark.parametrize("text", blocks("python"))
def test_imports_of_python_exist(text: str) -> None:
    tree = ast.parse(text)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "<page>", "exec"), {})


def test_blocks_say_their_language() -> None:
    plain = [f"{page.relative_to(ROOT)}" for page in PAGES for match in BLOCK.finditer(page.read_text()) if not match[1]]
    assert set(plain) <= {"docs/architecture.md"}, "a tree of files there; a block elsewhere says whether it is yaml, sh, python or text"
