"""Configurations, overrides, plugins and recipes that mean harm: each is refused with file, key and remedy, at little cost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gentrain.config import COMMAND_LINE, ConfigError, load
from gentrain.recipes.base import load_recipe
from gentrain.training.run import load_run
from tests.reliability.hostile import contained

RUN = "method: flow_matching\ndata: rings\nmodel: mlp\nengine: torch\ntraining: {samples: 64, batch_size: 16}\n"
MAIN = "main.yaml"
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)  # 10^10 values
MAPPED_LAUGHS = "a0: &a0 {x: 1, y: 2}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 40))
MERGED_LAUGHS = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}], k{i}: 1}}\n" for i in range(1, 10)
)
TEXT_LAUGHS = f"a0: {'ha' * 50}\n" + "".join(f"a{i}: '{f'${{a{i - 1}}}' * 10}'\n" for i in range(1, 12))
NODE_LAUGHS = "a0: {x: 1}\n" + "".join(f"a{i}: {{x: '${{a{i - 1}}}', y: '${{a{i - 1}}}'}}\n" for i in range(1, 40))
SIDEWAYS_LAUGHS = "a0: {s: haha}\nb0: '${a0}'\n" + "".join(
    f"a{i}: {{s: '{f'${{b{i - 1}.s}}' * 10}'}}\nb{i}: '${{a{i}}}'\n" for i in range(1, 12)
)
CHAIN = "a0: 1\n" + "".join(f"a{i}: ${{a{i - 1}}}\n" for i in range(1, 1900))
BACKWARDS = "".join(f"a{i - 1}: ${{a{i}}}\n" for i in range(1, 1900)) + "a1899: 1\n"


def _huge(folder: Path) -> None:
    with (folder / MAIN).open("wb") as file:
        file.truncate(100_000_000)


def _bases(folder: Path) -> None:
    """Ten files that each name the next one ten times."""
    for number in range(10):
        (folder / f"b{number}.yaml").write_text(f"base: [{', '.join([f'b{number + 1}.yaml'] * 10)}]\n")
    (folder / "b10.yaml").write_text("seed: 1\n")
    (folder / MAIN).write_text("base: b0.yaml\n")


def _deep(length: int) -> Callable[[Path], None]:
    """Files that each put the next one 20 mappings deep."""

    def build(folder: Path) -> None:
        for number in range(length):
            (folder / f"b{number}.yaml").write_text("{a: " * 20 + f"{{base: b{number + 1}.yaml}}" + "}" * 20)
        (folder / f"b{length}.yaml").write_text("seed: 1\n")
        (folder / MAIN).write_text("base: b0.yaml\n")

    return build


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe.yaml")
    (folder / MAIN).write_text("base: pipe.yaml\n")


Build = str | bytes | Callable[[Path], None]
TOO_MANY, TOO_DEEP = "more than 10,000 values", "nested more than 50 deep; flatten"
NO_TAG = "could not determine a constructor for the tag"
UNREADABLE, TOO_LARGE = "cannot read the interpolation in ", "interpolations expand to more than 1,000,000 characters; write the value out"

# what, contents of main.yaml, file that is named, key, what the message says
FILES: list[tuple[str, Build, str, str, str]] = [
    # YAML
    ("key twice", RUN + "model: mlp\n", MAIN, "", "in line 6: found duplicate key model"),
    ("key twice below", "training: {samples: 1, samples: 2}\n", MAIN, "", "found duplicate key samples"),
    ("billion laughs", LAUGHS, MAIN, "", TOO_MANY),
    ("billion laughs in mappings", MAPPED_LAUGHS, MAIN, "", TOO_MANY),
    ("billion laughs by merging", MERGED_LAUGHS, MAIN, "", TOO_MANY),
    ("alias within itself", "a: &a [*a]\n", MAIN, "", "recursive aliases are not supported"),
    ("alias of nothing", "a: *b\n", MAIN, "", "found undefined alias"),
    ("tag that runs a command", "a: !!python/object/apply:os.system ['touch {folder}/pwned']\n", MAIN, "", NO_TAG),
    ("tag that makes an object", "a: !!python/object/new:subprocess.Popen [[touch, '{folder}/pwned']]\n", MAIN, "", NO_TAG),
    ("tag that names code", "a: !!python/name:os.system\n", MAIN, "", NO_TAG),
    ("tag that imports", "a: !!python/module:antigravity\n", MAIN, "", NO_TAG),
    ("tag that includes", "a: !include /etc/passwd\n", MAIN, "", NO_TAG),
    ("picture", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), MAIN, "", "cannot read it as a mapping of keys to values: 'utf-8' codec"),
    ("zeros", bytes(1000), MAIN, "", "control characters are not allowed"),
    ("UTF-16", "seed: 1\n".encode("utf-16"), MAIN, "", "'utf-8' codec"),
    ("commands for terminals", RUN + "output: a\x1b[2Jb\n", MAIN, "", "control characters are not allowed"),
    ("NUL in a text", RUN + 'output: "a\\0b"\n', MAIN, "output", r"holds the control character '\x00'; remove it"),
    ("commands for terminals, escaped", RUN + 'output: "a\\e[2Jb"\n', MAIN, "output", r"holds the control character '\x1b'; remove it"),
    ("truth that is none", RUN + "seed: !!bool maybe\n", MAIN, "", "a value is not of its type (KeyError"),
    ("number of no digits", RUN + "seed: !!int ''\n", MAIN, "", "a value is not of its type (IndexError"),
    ("time that is none", RUN + "seed: !!timestamp x\n", MAIN, "", "a value is not of its type (AttributeError"),
    ("number of 60,000 parts", RUN + f"seed: {'59:' * 60_000}59.5\n", MAIN, "", "a value is not of its type (OverflowError"),
    ("four billion sizes", RUN + "cluster: {place: ray, workers: [1, 4000000000]}\n", MAIN, "cluster.workers", "at most 100 apart"),
    ("100 MB", _huge, MAIN, "", "it is larger than 256 KiB"),
    ("100,000 brackets", "a: " + "[" * 100_000, MAIN, "", TOO_DEEP),
    ("20,000 braces", "a: " + "{a: " * 20_000, MAIN, "", TOO_DEEP),
    ("20,000 dashes", "a:\n " + "- " * 20_000 + "x\n", MAIN, "", TOO_DEEP),
    ("10,001 values", "a: [" + "1, " * 10_001 + "]\n", MAIN, "", TOO_MANY),
    ("tab", RUN + "cluster:\n\tworkers: 2\n", MAIN, "", "in line 7: found character"),
    ("two documents", RUN + "---\n" + RUN, MAIN, "", "but found another document"),
    ("a number as a key", RUN + "3: 4\n", MAIN, "", "keys must be text, got 3"),
    ("null as a key", RUN + "~: 4\n", MAIN, "", "keys must be text, got None"),
    ("yes as a key", RUN + "cluster: {yes: 4}\n", MAIN, "cluster", "keys must be text, got True"),
    ("a list as a key", RUN + "[a]: 4\n", MAIN, "", "found unhashable key"),
    ("number of 5,000 digits", RUN + f"seed: {'9' * 5000}\n", MAIN, "", "integer string conversion"),
    ("number of 50,000 hexadecimal digits", RUN + f"seed: 0x{'f' * 50_000}\n", MAIN, "seed", "whole numbers end at 2^63; lower it"),
    ("200,000 letters for a number", RUN + f"seed: {'x' * 200_000}\n", MAIN, "seed", "expected a whole number >= 0, got 'xxxxx"),
    # interpolation
    ("circle", RUN + "output: ${x}\nx: ${output}\n", MAIN, "output", "Recursive interpolation detected"),
    ("itself", RUN + "output: a${output}\n", MAIN, "output", "ecursive interpolation"),
    ("what it is in", "training: {samples: '${training}'}\n", MAIN, "training.samples", "nterpolation"),
    ("texts that grow", TEXT_LAUGHS, MAIN, "a4", TOO_LARGE),
    ("mappings that grow", NODE_LAUGHS, MAIN, "a10", TOO_LARGE),
    ("growth through another one's result", SIDEWAYS_LAUGHS, MAIN, "a1.s", "cannot reach into another one's result; b0 is one"),
    ("chain of 1,900", CHAIN, MAIN, "", TOO_LARGE),
    ("chain of 1,900 from its end", BACKWARDS, MAIN, "", "too many interpolations refer to one another; write some of the values out"),
    ("one in another", RUN + "output: ${tr${x}}\n", MAIN, "output", UNREADABLE),
    ("decoder", RUN + "output: ${oc.decode:'${output}'}\n", MAIN, "output", UNREADABLE),
    ("resolver", RUN + "output: ${oc.create:[1]}\n", MAIN, "output", "there are ${key}, ${output:STAGE} and ${oc.env:NAME}"),
    ("100,000 brackets in one", RUN + f"output: '{'${' * 100_000}'\n", MAIN, "output", UNREADABLE),
    ("no such variable", RUN + "output: ${oc.env:NO_SUCH}\n", MAIN, "output", "the environment variable NO_SUCH is not set; export it"),
    ("variable in a variable", RUN + "output: ${oc.env:${x}}\nx: HOME\n", MAIN, "output", UNREADABLE),
    # base
    ("bases that grow", _bases, "b9.yaml", "base", "more than 100 files are named by `base:`"),
    ("bases that go deep", _deep(4), "b0.yaml", "a.a.a", TOO_DEEP),
    ("bases that go deeper", _deep(90), MAIN, "", "one in the other, are nested more than 50 deep"),
    ("base is a folder", "base: .\n", "", "", "it is not a regular file"),
    ("base is a pipe", _pipe, "pipe.yaml", "", "it is not a regular file"),
    ("base is a device", "base: /dev/zero\n", "zero", "", "it is not a regular file"),
    ("base is no configuration", "base: /etc/passwd\n", "passwd", "", "the top level must be a mapping"),
    ("base is itself", "base: main.yaml\n", MAIN, "base", "includes itself"),
    # code
    ("import path", RUN + "_target_: os.system\n", MAIN, "_target_", "unknown key"),
    ("import path below", RUN.replace("mlp", "{_target_: os.system, name: mlp}"), MAIN, "model._target_", "unknown key"),
    ("function as a method", RUN.replace("flow_matching", "os.system"), MAIN, "method.name", "no method is called 'os.system'"),
    ("class as a model", RUN.replace("mlp", "torch.nn.Linear"), MAIN, "model.name", "no model is called 'torch.nn.Linear'"),
    ("plugin that was not asked for", RUN.replace("rings", "stowaway"), MAIN, "data.name", "no data is called 'stowaway'"),
    ("no such plugin", RUN + "plugins: [nowhere.py]\n", MAIN, "plugins[0]", "'nowhere.py' failed to import: FileNotFoundError"),
    ("plugin that is a folder", RUN + "plugins: [folder.py]\n", MAIN, "plugins[0]", "'folder.py' failed to import: IsADirectoryError"),
    ("plugin that raises", RUN + "plugins: [raises.py]\n", MAIN, "plugins[0]", "failed to import: ZeroDivisionError"),
    ("plugin that exits", RUN + "plugins: [exits.py]\n", MAIN, "plugins[0]", "failed to import: SystemExit: 3"),
    ("plugin that never ends importing itself", RUN + "plugins: [deep.py]\n", MAIN, "plugins[0]", "failed to import: RecursionError"),
    ("plugin with a relative name", RUN + "plugins: [.os]\n", MAIN, "plugins[0]", "'.os' failed to import"),
    ("plugins in a mapping", RUN + "plugins: {a: b}\n", MAIN, "plugins", "expected a list of .py files or module names"),
]  # fmt: skip


def _prepare(folder: Path, build: Build) -> Path:
    (folder / "folder.py").mkdir()
    (folder / "stowaway.py").write_text("raise SystemExit('it was loaded')\n")
    (folder / "raises.py").write_text("1 / 0\n")
    (folder / "exits.py").write_text("raise SystemExit(3)\n")
    (folder / "deep.py").write_text("def f(): f()\nf()\n")
    if isinstance(build, str):
        build = build.replace("{folder}", str(folder)).encode()
    if isinstance(build, bytes):
        (folder / MAIN).write_bytes(build)
    else:
        build(folder)
    return folder / MAIN


@pytest.mark.parametrize("build, file, key, message", [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_a_hostile_file_is_refused(tmp_path: Path, build: Build, file: str, key: str, message: str) -> None:
    path = _prepare(tmp_path, build)
    with contained(tmp_path), pytest.raises(ConfigError) as caught:
        load_run(path)
    _check(caught.value, file or tmp_path.name, key, message)


def _check(error: ConfigError, file: str, key: str, message: str) -> None:
    assert (Path(error.source or "").name, error.key) == (file, key), str(error)[:1000]
    assert message in error.message
    assert "\n" not in str(error) and len(str(error)) < 1000
    assert "root:" not in str(error)  # of /etc/passwd


# what, override, key, what the message says
OVERRIDES = [
    ("10,000 brackets", "plugins=" + "[" * 10_000, "plugins", TOO_DEEP),
    ("command", "seed=!!python/object/apply:os.system [true]", "seed", NO_TAG),
    ("laughs", "seed={a: &a [1, 1, 1, 1], b: &b [*a, *a, *a, *a], c: [*b, *b, *b, *b]}", "seed", "expected a whole number >= 0"),
    ("number of 5,000 digits", f"seed={'9' * 5000}", "seed", "integer string conversion"),
    ("resolver", "output=${oc.decode:x}", "output", UNREADABLE),
    ("into a list", "plugins[0]=x.py", "plugins[0]", "give the whole list"),
    ("no key", "=1", "", "write it as key=value"),
    ("private key", "model.__class__=x", "model.__class__", "unknown key"),
]


@pytest.mark.parametrize("override, key, message", [row[1:] for row in OVERRIDES], ids=[row[0] for row in OVERRIDES])
def test_a_hostile_override_is_refused(tmp_path: Path, override: str, key: str, message: str) -> None:
    path = _prepare(tmp_path, RUN)
    with contained(tmp_path), pytest.raises(ConfigError) as caught:
        load_run(path, [override])
    assert message in caught.value.message and "\n" not in str(caught.value)
    assert (caught.value.source, caught.value.key) == (COMMAND_LINE, key)


TRAIN = f"{{name: train, run: {{{', '.join(RUN.splitlines())}}}}}"

# what, text of main.yaml, key, what the message says
RECIPES = [
    ("stage that climbs", f"stages: {{../a: {TRAIN}}}\n", "stages.../a", "a stage's name becomes a directory"),
    ("stage with a path", f"stages: {{/tmp/a: {TRAIN}}}\n", "stages./tmp/a", "a stage's name becomes a directory"),
    ("stage that is its parent", f"stages: {{'..': {TRAIN}}}\n", "stages...", "a stage's name becomes a directory"),
    ("stage with a new line", f'stages: {{"a\\nb": {TRAIN}}}\n', "stages.a\nb", "a stage's name becomes a directory"),
    ("output that climbs", "stages: {b: {name: generate, run: '${output:../a}'}}\n", "stages.b.run", UNREADABLE),
    ("output of nothing", "stages: {b: {name: generate, run: '${output:a}'}}\n", "stages.b.run", "no stage is called 'a'"),
    ("output of itself", "stages: {b: {name: generate, run: '${output:b}'}}\n", "stages.b", "it reads its own output"),
    ("function as a stage", "stages: {b: {name: os.system, run: x}}\n", "stages.b.name", "no stage is called 'os.system'"),
    ("plugin of a run", f"stages: {{a: {TRAIN.replace('{method', '{plugins: [raises.py], method')}}}\n", "stages.a.run.plugins[0]", ""),
]  # fmt: skip


@pytest.mark.parametrize("text, key, message", [row[1:] for row in RECIPES], ids=[row[0] for row in RECIPES])
def test_a_hostile_recipe_is_refused(tmp_path: Path, text: str, key: str, message: str) -> None:
    path = _prepare(tmp_path, text)
    with contained(tmp_path), pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert (Path(caught.value.source or "").name, caught.value.key) == (MAIN, key)
    assert message in caught.value.message


def test_what_only_looks_hostile_is_read(tmp_path: Path) -> None:
    """Anchors, merge keys, a byte order mark, a base that serves often, a reference to a section."""
    (tmp_path / "base.yaml").write_text("seed: 3\n")
    path = _prepare(
        tmp_path, "\ufeffbase: [base.yaml, base.yaml]\na: &a {x: 1}\nb: {<<: *a, y: 2}\nc: ${b}\nd: '${b.x} ${oc.env:HOME} ${.seed}'\n"
    )
    assert load(path).values == {
        "seed": 3, "a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1, "y": 2}, "d": "1 ${oc.env:HOME} 3",
    }  # fmt: skip
