"""The journal of a run outlives a line that was cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gentrain.cluster.attempts import ATTEMPTS, last_failure, note, note_silence


@pytest.mark.parametrize("cut", ['{"time": "2026', "\xff\x00", "[1, 2]", "{}"])
def test_a_cut_line_hides_no_other(tmp_path: Path, cut: str) -> None:
    note(tmp_path, "started", attempt=1)
    note(tmp_path, "failed", reason="a full disk")
    with (tmp_path / ATTEMPTS).open("a") as file:
        file.write(cut)
    assert last_failure(tmp_path) == "a full disk"
    note(tmp_path, "started", attempt=2)
    lines = (tmp_path / ATTEMPTS).read_text().splitlines()
    assert lines[-2] == cut and json.loads(lines[-1])["attempt"] == 2
    note_silence(tmp_path)
    assert last_failure(tmp_path).startswith("ended without a word")


def test_a_failure_without_a_reason_has_none(tmp_path: Path) -> None:
    (tmp_path / ATTEMPTS).write_text('{"event": "failed"}\n')
    assert last_failure(tmp_path) == ""


def test_whole_lines_follow_each_other(tmp_path: Path) -> None:
    for number in range(3):
        note(tmp_path, "started", attempt=number)
    text = (tmp_path / ATTEMPTS).read_text()
    assert [json.loads(line)["attempt"] for line in text.split("\n")[:-1]] == [0, 1, 2] and text.endswith("}\n")
