from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gentrain.data.base import BatchItems
from gentrain.data.prompts import Prompts


def test_lines_and_objects_become_captions_each_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\n  zoo \na cat\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "no", "prompt": "a cat"}\n{"prompt": "zoo"}\n', encoding="utf-8")
    lines, objects = Prompts(str(tmp_path / "a.txt"), size=8), Prompts(str(tmp_path / "b.jsonl"), field="prompt", colours="grey")
    assert list(lines.captions) == list(objects.captions) == ["a cat", "zoo"]
    assert lines.shape == (3, 8, 8) and objects.shape == (1, 64, 64)
    items = lines.split("train")
    assert isinstance(items, BatchItems) and len(items) == 2 and int(items[1]["caption"]) == 1
    batch = items.batch(torch.tensor([1, 0, 1]))
    assert batch["x"].shape == (3, 3, 8, 8) and batch["caption"].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("none.txt", None, r"cannot be read .*UTF-8"),
        ("empty.txt", "\n \n", r"no prompt in .*empty\.txt"),
        ("a.jsonl", '{"text": "x"}\nnot json\n', r"line 2 of .*a\.jsonl is no object with 'text' \(JSONDecodeError\)"),
        ("b.jsonl", '{"caption": "x"}\n', r"line 1 of .* is no object with 'text' \(KeyError\)"),
        ("c.jsonl", '{"text": 3}\n', r"line 1 of .* holds a 'text' that is no text"),
        ("d.txt", "a cat\na \x1b[2Jdog\n", r"line 2 of .*d\.txt holds characters that cannot be printed"),
        ("e.jsonl", '{"text": "\\ud800"}\n', r"line 1 of .* cannot be printed"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        Prompts(str(tmp_path / name)).fit()


def test_what_editors_and_writers_of_json_leave_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    """A mark of the byte order, Windows' ends of lines, tabulators; separators within a string; joiners of letters and of emoji."""
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\r\na\ttall  dog\r\n\u06a9\u062a\u0627\u0628\u200c\u0647\u0627\n".encode())
    assert list(Prompts(str(tmp_path / "a.txt")).captions) == ["a cat", "a tall dog", "\u06a9\u062a\u0627\u0628\u200c\u0647\u0627"]
    (tmp_path / "B.JSONL").write_text('{"text": "two\u2028lines"}\n\n{"text": ""}\n', encoding="utf-8")
    assert list(Prompts(str(tmp_path / "B.JSONL")).captions) == ["two lines"]
