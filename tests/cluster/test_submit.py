"""The commands submit, status, logs, stop and resume, with a stand-in for what the place `local` runs."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from gentrain import cli
from gentrain.cluster.submissions import RECORD
from tests.reliability.leftovers import sessions_ended

PYTHON = sys.executable
Command = Callable[..., tuple[int, str]]
TOY = """
method: flow_matching
data: {name: rings, held_out: 200}
model: {name: mlp, width: 8, depth: 1}
engine: torch
training: {samples: 64, batch_size: 16}
"""
# Runs until it is asked to stop; where there is a file `done`, to its end.
STAND_IN = "#!/bin/sh\necho began; echo $SHOWN\ntrap 'exit 75' TERM\nwhile :; do [ -e {done} ] && exit 0; sleep 0.05; done\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing that was submitted outlives the test."""
    script = tmp_path / "python"
    script.write_text(STAND_IN.format(done=tmp_path / "done"))
    script.chmod(0o755)
    (tmp_path / "toy.yaml").write_text(TOY)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(cli, "console", Console(width=250))
    with sessions_ended():
        yield tmp_path


@pytest.fixture
def gentrain(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process: (exit status, what it printed, on both streams)."""

    def call(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        status = cli._guarded(lambda **options: cli.app(args=list(arguments), **options))
        printed = "".join(capsys.readouterr())
        assert "Traceback" not in printed
        return status, printed

    return call


def _until(gentrain: Command, run: str, state: str) -> None:
    deadline = time.monotonic() + 20
    while state not in (printed := gentrain("status", run)[1]):
        assert time.monotonic() < deadline, printed
        time.sleep(0.05)


@pytest.mark.parametrize("output", ["runs/toy", "../elsewhere/toy"])
def test_what_was_submitted_is_found_by_what_is_printed(gentrain: Command, folder: Path, output: str) -> None:
    """In runs/ the name is enough; what lies elsewhere is called by its directory."""
    status, printed = gentrain("submit", "../toy.yaml", f"output={output}", "cluster.submit.environment.SHOWN=it is shown")
    assert status == 0 and "submitted: toy to local" in printed and "toy needs" in printed
    called = "toy" if output == "runs/toy" else str(folder / "elsewhere/toy")
    assert f"logs: gentrain logs {called} -f\n" in printed
    _until(gentrain, called, "running")
    status, printed = gentrain("submit", "../toy.yaml", f"output={output}")
    assert status == 2 and f"{called} is running already; follow it with: gentrain logs {called} -f" in printed
    status, printed = gentrain("resume", called)
    assert status == 2 and "is running already" in printed
    assert gentrain("stop", called) == (0, f"asked to stop: {called}. See: gentrain status {called}\n")
    _until(gentrain, called, "stopped")
    assert gentrain("stop", called) == (0, f"{called} runs no more: stopped\n")
    assert gentrain("logs", called) == (0, "began\nit is shown\n")
    assert gentrain("resume", called)[0] == 0
    (folder / "done").touch()
    assert gentrain("logs", called, "-f") == (0, "began\nit is shown\n")
    _until(gentrain, called, "succeeded")
    status, printed = gentrain("resume", called)
    assert status == 2 and f"{called} has succeeded: nothing is left to do" in printed


def test_a_record_that_is_damaged_does_not_hide_the_others(gentrain: Command, folder: Path) -> None:
    assert gentrain("submit", "../toy.yaml", "output=runs/toy")[0] == 0
    Path("runs/broken").mkdir()
    Path("runs/broken", RECORD).write_text("{")
    status, printed = gentrain("status")
    assert status == 0 and "runs/broken/submission.json: damaged" in printed and "│ toy " in printed
    assert gentrain("status", "broken")[0] == 2


def test_a_damaged_record_is_not_written_over_and_says_what_to_do(gentrain: Command) -> None:
    """It may stand for a job that still runs."""
    Path("runs/toy").mkdir(parents=True)
    record = Path("runs/toy", RECORD)
    record.write_text("{")
    for command in (["submit", "../toy.yaml", "output=runs/toy"], ["resume", "toy"], ["stop", "toy"], ["logs", "toy"]):
        status, printed = gentrain(*command)
        assert status == 2 and "remove the file, then submit the run again" in " ".join(printed.split()) and record.read_text() == "{"
    record.unlink()
    assert gentrain("submit", "../toy.yaml", "output=runs/toy")[0] == 0


def test_a_directory_that_was_moved_is_not_begun_anew_where_it_was(gentrain: Command, folder: Path) -> None:
    assert gentrain("submit", "../toy.yaml", "output=runs/toy")[0] == 0
    _until(gentrain, "toy", "running")
    assert gentrain("stop", "toy")[0] == 0
    _until(gentrain, "toy", "stopped")
    here = folder / "here/runs"
    (here / "toy").rename(here / "moved")
    status, printed = gentrain("resume", "moved")
    assert status == 2 and f"moved was submitted as {here}/toy and would begin anew there; move it back, or" in printed
    assert f"submit it with output={here}/moved" in printed and not (here / "toy").exists()
    (here / "moved").rename(here / "toy")
    Path("elsewhere").symlink_to("runs")
    assert gentrain("resume", "elsewhere/toy")[0] == 0  # the same directory by another name


@pytest.mark.parametrize(
    "override, message", [("seed=3", "output: .* holds a run with another seed"), ("training.samples=32", "has seen 64 samples already")]
)
def test_what_a_directory_cannot_go_on_with_is_told_before_it_is_sent(gentrain: Command, override: str, message: str) -> None:
    """Not by a job that has waited in a queue, nor does it take the place of what `resume` would send."""
    assert gentrain("train", "../toy.yaml", "output=runs/toy")[0] == 0
    assert gentrain("submit", "../toy.yaml", "output=runs/toy")[0] == 0
    _until(gentrain, "toy", "running")
    assert gentrain("stop", "toy")[0] == 0
    _until(gentrain, "toy", "stopped")
    record = Path("runs/toy", RECORD).read_bytes()
    status, printed = gentrain("submit", "../toy.yaml", "output=runs/toy", override)
    assert status == 2 and re.search(message, printed), printed
    assert Path("runs/toy", RECORD).read_bytes() == record and "seed: 0" in Path("runs/toy/submission/config.yaml").read_text()
    assert gentrain("submit", "../toy.yaml", "output=runs/toy", "training.samples=128")[0] == 0


def test_what_has_printed_nothing_says_how_it_is(gentrain: Command, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "python").write_text("#!/bin/sh\nexit 0\n")
    assert gentrain("submit", "../toy.yaml", "output=runs/toy")[0] == 0
    _until(gentrain, "toy", "succeeded")
    assert gentrain("logs", "toy")[0] == 0 and caplog.messages[-1] == "toy has printed nothing; it is succeeded"


@pytest.mark.parametrize("where", ["toy.yaml", "command line"])
def test_a_mistake_that_a_place_finds_is_told_with_its_file(gentrain: Command, folder: Path, where: str) -> None:
    submit = "{name: slurm, nodes: 2}"
    if where == "toy.yaml":
        (folder / "toy.yaml").write_text(f"{TOY}cluster: {{submit: {submit}}}\n")
    status, printed = gentrain("submit", "../toy.yaml", "--dry-run", *([f"cluster.submit={submit}"] if where == "command line" else []))
    assert status == 2 and f"{where}: cluster.submit.nodes: 2 nodes for a run in one process; set cluster.place to ray" in printed


def test_a_recipe_is_read_by_a_process_that_has_read_nothing_else() -> None:
    root = Path(__file__).parents[2]
    command = [PYTHON, "-m", "gentrain.cli", "submit", "configs/quickstart.yaml", "--dry-run"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "-m gentrain.cli run " in done.stdout, done.stderr


def test_a_dry_run_prints_what_would_be_run_and_writes_nothing(gentrain: Command, folder: Path) -> None:
    environment = 'cluster.submit.environment={SHOWN: "it\'s $HOME"}'
    status, printed = gentrain("submit", "../toy.yaml", "output=runs/toy", environment, "--dry-run")
    assert status == 0 and not list(Path().iterdir())
    script = printed.partition("# --- job.sh\n")[2]
    assert "export SHOWN='it'\"'\"'s $HOME'\n" in script
    assert f"exec {folder}/python -m gentrain.cli train {folder}/here/runs/toy/submission/config.yaml\n" in script
    assert gentrain("submit", "../toy.yaml", "output=runs/toy", environment)[0] == 0
    assert Path("runs/toy/submission/job.sh").read_text().rstrip() == script.rstrip()
    assert "# --- config.yaml\n" + Path("runs/toy/submission/config.yaml").read_text().rstrip() in printed
    deadline = time.monotonic() + 20
    while (told := gentrain("logs", "toy"))[1].count("\n") < 2:  # its process is there before its words are
        assert time.monotonic() < deadline
    assert told == (0, "began\nit's $HOME\n")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["output=s3://bucket/toy"], "output: s3://bucket/toy is a URL, and this has to be a directory"),
        (["output=~/toy"], "output: ~/toy would be a directory called '~' here"),
        (["output=${oc.env:HOME}/toy"], "is found again by its directory; write that out"),
        (["cluster.submit=slrum"], "no place is called 'slrum'; did you mean 'slurm'"),
        (["cluster.submit={name: slurm, node: 2}"], "cluster.submit.node: unknown key; did you mean 'nodes'"),
        (["cluster.submit={name: slurm, array: ['seed=1', 'sede=2']}"], "cluster.submit.array: entry 1: command line: sede: unknown key"),
        (
            ["cluster.place=ray", "cluster.submit={name: slurm, array: ['seed=1', 'cluster.workers=2']}"],
            "cluster.submit.array: entry 1: cluster.submit.nodes: 2 workers do not fit on 1 nodes with room for 1 each",
        ),
        (
            ["cluster.place=ray", "cluster.submit={name: slurm, array: ['cluster.grace_s=90']}"],
            "cluster.submit.array: entry 0: cluster.grace_s: workers may take 90 s",
        ),
        (["cluster.submit={name: slurm, array: ['note=\"x']}"], "cluster.submit.array: No closing quotation; quote an entry"),
        (["cluster.submit={name: local, secrets: [NOT_THERE_8]}"], "cluster.submit.secrets: the environment has no NOT_THERE_8"),
        (["cluster.submit={name: slurm, secrets: [NOT_THERE_8]}"], "cluster.submit.secrets: the environment has no NOT_THERE_8"),
        (["cluster.place=rya"], "cluster.place"),
    ],
)
def test_a_mistake_is_told_before_anything_is_sent(gentrain: Command, overrides: list[str], message: str) -> None:
    status, printed = gentrain("submit", "../toy.yaml", *overrides)
    assert status == 2 and message in printed, printed
    assert not list(Path().rglob(RECORD)) and not list(Path().rglob("*.log"))


def test_only_what_an_array_runs_has_to_fit(gentrain: Command) -> None:
    """The configuration without the overrides of any entry is no task of it; nor are the workers of one entry with the cores of another."""
    entries = "['cluster.workers=1 cluster.cpus_per_worker=2', 'cluster.workers=2']"
    submit = f"cluster.submit={{name: slurm, cpus_per_node: 2, array: {entries}}}"
    status, printed = gentrain("submit", "../toy.yaml", "cluster.place=ray", "cluster.workers=8", submit, "--dry-run")
    assert status == 0 and "command+=(cluster.workers=2 output=" in printed


def test_a_plan_looks_at_the_place_too(gentrain: Command) -> None:
    assert gentrain("plan", "../toy.yaml", "cluster.submit=slurm")[0] == 0
    status, printed = gentrain("plan", "../toy.yaml", "cluster.submit=slrum")
    assert status == 2 and "no place is called 'slrum'; did you mean 'slurm'" in printed


def test_a_place_without_its_commands_says_so(gentrain: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for submit, command in (("{name: slurm}", "sbatch"), ("{name: kuberay, image: x, memory_gib: 8, claim: c, storage: /runs}", "kubectl")):
        status, printed = gentrain("submit", "../toy.yaml", "cluster.place=ray", f"cluster.submit={submit}")
        assert status == 1 and f"{command} is not installed here" in printed
        memory = ", 8 GiB" if command == "kubectl" else ""
        assert f": 1 nodes of 1 cores, 0 accelerators{memory}; the time limit of the place, started again up to 3 times" in printed
        assert gentrain("status", "toy")[0] == 2  # it was not accepted, so nothing is known of it
