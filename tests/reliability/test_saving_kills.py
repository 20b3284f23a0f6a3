"""A run that is killed at any moment of saving, assembling or exporting goes on from what it published last, to the same last bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gentrain.training.run import CHECKPOINTS
from tests.distributed.cases import difference, newest, records, state_of
from tests.reliability.kills import AT, MOMENTS

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parents[2]
ASSEMBLY = "during assembly for another world size"
SAVING = [f"{moment}{how}" for moment in MOMENTS for how in ("", ", asynchronous")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kills")
    done = subprocess.run([sys.executable, "-m", "tests.reliability.kills", str(root)], cwd=ROOT, timeout=280, check=False)
    assert done.returncode == 0
    return root


@pytest.mark.parametrize("moment", [*SAVING, ASSEMBLY, "during export"])
def test_the_process_was_killed_and_the_next_one_came_to_its_end(folder: Path, moment: str) -> None:
    assert json.loads((folder / "told.json").read_text())[moment] == [-9, 0]


@pytest.mark.parametrize("moment", [*SAVING, ASSEMBLY])
def test_what_was_published_last_is_there_bit_for_bit(folder: Path, moment: str) -> None:
    killed = folder / f"{moment}-killed"
    last = newest(killed).name
    assert last == (AT if moment.startswith("during deletion") else f"{48:012d}")
    assert difference(state_of(killed), state_of(folder / "whole", last)) == 0


@pytest.mark.parametrize("moment", [*SAVING, ASSEMBLY])
def test_the_run_that_goes_on_ends_like_one_that_was_never_killed(folder: Path, moment: str) -> None:
    assert difference(state_of(folder / moment), state_of(folder / "whole")) == 0
    assert records(folder / moment) == records(folder / "whole")
    assert sorted(path.name for path in (folder / moment / CHECKPOINTS).iterdir()) == [f"{120:012d}", "LATEST", "OWNER"]


def test_a_killed_export_leaves_no_half_and_the_next_one_tidies_up(folder: Path) -> None:
    assert [path.name for path in (folder / "exported").iterdir()] == ["out"]
    assert (folder / "exported" / "out" / "weights").read_text() == "whole"
