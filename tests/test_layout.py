"""Rules of the source tree that no linter knows."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "gentrain").rglob("*.py"))
HEAVY = {
    "accelerate",
    "deepspeed",
    "diffusers",
    "matplotlib",
    "mlxtend",
    "ot",
    "pandas",
    "ray",
    "scipy",
    "sklearn",
    "tensorboard",
    "transformers",
}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module a file imports, at any depth, with its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def offenders(forbidden: str, allowed: str | None) -> list[str]:
    files = [path for path in SOURCES if allowed is None or ROOT / "gentrain" / allowed not in path.parents]
    return [f"{path.relative_to(ROOT)}:{line}" for path in files for name, line in imports(path) if f"{name}.".startswith(f"{forbidden}.")]


@pytest.mark.parametrize("module, package", [("ray", "cluster"), ("deepspeed", "training"), ("torchvision", None)])
def test_a_library_is_imported_by_its_package_only(module: str, package: str | None) -> None:
    assert offenders(module, package) == []


@pytest.mark.parametrize("package", ["data", "domains", "methods", "metrics", "models", "paths", "rewards", "samplers"])
def test_methods_and_what_they_use_know_no_ranks(package: str) -> None:
    files = [path for path in SOURCES if ROOT / "gentrain" / package in path.parents]
    assert files
    assert [f"{p.name}:{line}" for p in files for name, line in imports(p) if f"{name}.".startswith("torch.distributed.")] == []


def test_importing_everything_costs_no_more_than_torch() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES]
    names = [name.removesuffix(".__init__") for name in names if name != "gentrain.export_pipeline"]  # runs without gentrain, on diffusers
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\nprint(*sorted({HEAVY} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_files_and_functions_stay_readable() -> None:
    long_files = {str(path.relative_to(ROOT)): lines for path in SOURCES if (lines := len(path.read_text().splitlines())) > 420}
    functions = {
        f"{path.relative_to(ROOT)}:{node.name}": length
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (length := (node.end_lineno or 0) - node.lineno + 1) > 55
    }
    assert (long_files, functions) == ({}, {})


def test_no_placeholders_are_left() -> None:
    words = ("TO" + "DO", "FIX" + "ME", "X" + "XX")
    assert [str(path.relative_to(ROOT)) for path in SOURCES if any(word in path.read_text() for word in words)] == []


def test_links_between_documents_lead_somewhere() -> None:
    import re

    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "launch").rglob("*.md")]
    assert len(pages) > 5
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []


def test_every_method_has_a_page_of_its_name() -> None:
    from gentrain.methods.base import Method

    ours = [name for name, method in Method.available().items() if method.__module__.startswith("gentrain.")]
    assert [name for name in ours if not (ROOT / "docs" / "methods" / f"{name}.md").is_file()] == []


def test_every_registered_name_stands_in_a_test() -> None:
    """As a name in quotes or in a configuration, or by its class; long proofs do not count."""
    import re

    from gentrain.catalogue import kinds

    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if "gates" not in path.relative_to(ROOT).parts)
    ours = [each for entries in kinds().values() for each in entries.items() if each[1].__module__.startswith("gentrain.")]
    assert len(ours) > 150
    untested = [n for n, kind in ours if not re.search(rf"[\"']{n}[\"']|\b{kind.__name__}\b|name: {n}\b|={n}\b", text)]
    assert untested == []
