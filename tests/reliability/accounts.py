"""What tests/reliability/plugin_faults.py has written down. Apart from it: whoever imports a plugin cannot load it as one."""

from __future__ import annotations

import json
from pathlib import Path


def seen(directory: Path) -> list[list[int]]:
    """The samples of each step, over all ranks, in the order of time."""
    lines = [json.loads(line) for line in (directory / "seen.jsonl").read_text().splitlines()]
    return [line["index"] for line in sorted(lines, key=lambda line: line["time"])]


def repeated(directory: Path, samples: int) -> int:
    """How many of a run's samples were drawn again because of faults; each of them was drawn at least once, or it raises."""
    counts = [0] * samples
    for step in seen(directory):
        for index in step:
            counts[index] += 1
    assert min(counts) >= 1, f"sample {counts.index(0)} was never drawn"
    return sum(counts) - samples
