"""Signals, and sys.exit, at any moment of a command: what it comes to, says and leaves. See moments.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from gentrain.cluster.attempts import ATTEMPTS
from gentrain.cluster.stopping import StopRequested, kept
from gentrain.training.run import CHECKPOINTS
from gentrain.training.storage import LocalStorage

pytestmark = pytest.mark.timeout(300)

PLUGIN = Path(__file__).with_name("plugin_moments.py")
RUN = {
    "method": "flow_of_moments",
    "plugins": [str(PLUGIN)],
    "data": "rings",
    "model": {"name": "mlp", "width": 8, "depth": 1},
    "engine": "torch",
    "training": {"samples": 64, "batch_size": 16, "log_every": 16},
}


def _write(folder: Path) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    stages = {"first": "moment", "second": "moment"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"stages": stages, "plugins": RUN["plugins"], "output": "recipe"}))


@dataclass
class Ends:
    folder: Path
    statuses: dict[str, int]

    def said(self, name: str) -> str:
        return " ".join((self.folder / f"{name}.txt").read_text().split())

    def checkpoints(self, name: str) -> list[int]:
        return [int(each) for each in LocalStorage(self.folder / name / CHECKPOINTS).names()]

    def events(self, name: str) -> list[str]:
        return [json.loads(line)["event"] for line in (self.folder / name / ATTEMPTS).read_text().splitlines()]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    folder = tmp_path_factory.mktemp("moments")
    _write(folder)
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.reliability.moments", str(folder)]
    subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": paths}, check=True, timeout=280)
    return Ends(folder, json.loads((folder / "statuses.json").read_text()))


def test_a_signal_before_training_begins_ends_the_command_which_says_that_nothing_is_published(ends: Ends) -> None:
    assert ends.statuses["fit"] == 75, ends.said("fit")
    assert "stopped where nothing had to be published" in ends.said("fit")
    assert f"Go on with: gentrain train run.yaml output={ends.folder / 'fit'}" in ends.said("fit")
    assert not (ends.folder / "fit").exists()


@pytest.mark.parametrize("module", ["logging", "typer", "torch"])
def test_a_signal_while_modules_are_imported(tmp_path: Path, module: str) -> None:
    """In a process of its own: the first import of the module brings the signal; logging is among the first that the command needs."""
    _write(tmp_path)
    code = f"""
import os, signal, sys

class Signals:
    def find_spec(self, name, path, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGUSR1)

sys.meta_path.insert(0, Signals())
from gentrain.cli import main
main()
"""
    command = [sys.executable, "-c", code, "train", "run.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 75 and "stopped where nothing had to be published" in " ".join(done.stdout.split()), done


def test_hanging_up_publishes_unless_nohup_has_it_ignored(ends: Ends) -> None:
    assert ends.statuses["step"] == 75 and ends.checkpoints("step") == [16]
    assert "stopped; a checkpoint is published" in ends.said("step")
    assert ends.statuses["nohup"] == 0 and ends.checkpoints("nohup") == [64]


def test_the_other_signal_that_schedulers_are_told_to_send_publishes(ends: Ends) -> None:
    assert ends.statuses["other"] == 75 and ends.checkpoints("other") == [16]


def test_closing_the_terminal_publishes(ends: Ends) -> None:
    """Though nothing can be printed there any more."""
    assert ends.statuses["terminal"] == 75
    (samples,) = ends.checkpoints("runs/run")
    assert 0 < samples < 1_000_000
    assert ends.events("runs/run") == ["started", "stopped"]


def test_a_reader_that_has_gone_changes_no_status(ends: Ends) -> None:
    """As `| tee log`, which the same Ctrl-C ends."""
    assert ends.statuses["deaf"] == 75 and ends.checkpoints("deaf") == [16]


@pytest.mark.parametrize("name", ["finished", "end"])
def test_a_signal_after_the_work_is_done_changes_nothing(ends: Ends, name: str) -> None:
    assert ends.statuses[name] == 0 and f"trained: {ends.folder / name}" in ends.said(name)


def test_a_signal_in_a_stage_that_does_not_train_stops_the_recipe_which_goes_on(ends: Ends) -> None:
    assert ends.statuses["recipe"] == 75
    assert "Go on with: gentrain run recipe.yaml" in ends.said("recipe") and "second" not in ends.said("recipe")
    assert ends.statuses["again"] == 0 and "first: going on: the last attempt was stopped" in ends.said("again")
    assert (ends.folder / "recipe/second/done").exists()


@pytest.mark.parametrize("name", ["step-exit", "stage-exit"])
def test_sys_exit_is_no_success(ends: Ends, name: str) -> None:
    assert ends.statuses[name] == 1 and "sys.exit(0) was called" in ends.said(name) and "not done" in ends.said(name)


def test_an_attempt_that_failed_in_this_process_says_why(ends: Ends) -> None:
    lines = [json.loads(line) for line in (ends.folder / "step-exit" / ATTEMPTS).read_text().splitlines()]
    assert [line["event"] for line in lines] == ["started", "failed"]
    assert lines[1]["reason"].startswith("rank 0: RuntimeError: sys.exit(0) was called")


def test_a_library_that_takes_the_handler_of_sigterm_for_itself_cannot_keep_it() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def take() -> None:
        with kept():
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StopRequested):
        take()
    assert signal.getsignal(signal.SIGTERM) == before
