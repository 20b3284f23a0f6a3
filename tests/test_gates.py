"""When the result of a gate is stale."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gates import results


def test_a_result_is_stale_when_a_file_that_its_gate_reads_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though nothing of gentrain is imported: a container is built from its files."""
    gate, read = tmp_path / "test_boxes.py", tmp_path / "Dockerfile"
    gate.touch()
    read.write_text("FROM a")

    def passes(arguments: list[str], plugins: list[results.Record]) -> int:
        plugins[0].passed = 1
        return 0

    for name, value in {"ROOT": tmp_path, "RESULTS": tmp_path / "gates.json", "WATCHED": {"boxes": ("Dockerfile",)}}.items():
        monkeypatch.setattr(results, name, value)
    monkeypatch.setattr(results, "_topics", lambda: {"boxes": [gate]})
    monkeypatch.setattr(results, "_git", lambda *_: "")
    monkeypatch.setattr(results.pytest, "main", passes)
    assert results.run("boxes") == 0 and results.status() == 0
    read.write_text("FROM b")
    assert results.status() == 1 and "stale" in capsys.readouterr().out


def test_what_is_watched_is_there() -> None:
    assert results.WATCHED.keys() <= results._topics().keys()
    assert all((results.ROOT / name).is_file() for names in results.WATCHED.values() for name in names)
