"""Every configuration that comes with gentrain can be planned. Pieces, which other files take by `base:`, may lack keys of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from gentrain import cli

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PIECES = {"model", "data", "cluster"}  # folders of pieces

pytestmark = pytest.mark.timeout(600)  # a recipe of many runs, on a crowded machine


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT)) for path in CONFIGS if path.parent.name not in PIECES])
def test_a_shipped_configuration_can_be_planned(path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    status = cli._guarded(lambda **options: cli.app(args=["plan", path], **options))
    printed, errors = capsys.readouterr()
    assert (status, errors) == (0, "")
    assert "parameters" in printed


def test_the_configurations_are_found() -> None:
    assert ROOT / "configs" / "quickstart.yaml" in CONFIGS
