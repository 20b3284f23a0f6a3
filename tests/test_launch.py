"""The examples in launch/ are what `gentrain submit --dry-run` prints today."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("render", ROOT / "launch" / "render.py")
assert _spec is not None and _spec.loader is not None
render = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(render)


@pytest.mark.parametrize("example", render.EXAMPLES)
def test_an_example_is_what_would_be_sent(example: str) -> None:
    kept = {path.name: path.read_text() for path in (ROOT / "launch" / example).iterdir()}
    assert kept == render.rendered(example), "render it again: python launch/render.py"
    assert not [name for name, text in kept.items() if str(ROOT) in text or str(Path.home()) + "/" in text]


def test_every_directory_is_an_example() -> None:
    assert {path.name for path in (ROOT / "launch").iterdir() if path.is_dir() and path.name != "__pycache__"} == set(render.EXAMPLES)
