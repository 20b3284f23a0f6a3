"""The `gentrain` command as a person meets it: what it prints, the exit status, and that no traceback answers an expected mistake."""

from __future__ import annotations

import errno
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from gentrain import cli
from gentrain.catalogue import kinds
from gentrain.cluster.attempts import ATTEMPTS
from gentrain.recipes import generate as generate_stage
from tests.distributed.cases import difference, newest, records, state_of

COMMANDS = [
    "run",
    "train",
    "sample",
    "evaluate",
    "export",
    "report",
    "plan",
    "methods",
    "doctor",
    "submit",
    "status",
    "logs",
    "stop",
    "resume",
]
TOY = """
method: flow_matching
data: {name: rings, held_out: 200}
model: {name: mlp, width: 8, depth: 1}
engine: torch
sampler: {name: euler, steps: 2}
training: {samples: 64, batch_size: 16, log_every: 16}
"""
DIGITS = """
method: flow_matching
data: digits
model: {name: unet, channels: [8, 8], attention: []}
engine: torch
sampler: {name: euler, steps: 2}
training: {samples: 32, batch_size: 16}
"""
RECIPE = """
stages:
  generator: {name: train, run: {base: toy.yaml}}
  drawn: {name: generate, run: '${output:generator}', count: 60}
  scores: {name: evaluate, data: {name: rings, held_out: 200}, samples: {drawn: '${output:drawn}'}}
"""

Command = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "console", Console(width=250))
    for name, text in {"toy": TOY, "digits": DIGITS, "recipe": RECIPE}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


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


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command as a process of its own, which does not outlive the test."""
    started: list[subprocess.Popen[str]] = []

    def call(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "from gentrain.cli import main; main()", *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield call
    for process in started:
        process.kill()  # Ray's processes end with the one that started them
        process.communicate()


# --- help and listings ------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_needs_no_torch() -> None:
    code = """
import sys
from gentrain.cli import main
sys.argv = ["gentrain", "--help"]
try:
    main()
except SystemExit as end:
    print("status", end.code, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "status 0 False" in done.stdout
    assert [command for command in COMMANDS if not re.search(rf"│ {command} ", done.stdout)] == []
    assert "75 stopped" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example(gentrain: Command, command: str) -> None:
    status, printed = gentrain(command, "--help")
    assert status == 0
    assert f"Example: gentrain {command}" in printed


def test_methods_lists_everything_that_configurations_can_name(gentrain: Command) -> None:
    status, printed = gentrain("methods")
    assert status == 0
    for kind, entries in kinds().items():
        assert f"{kind}s" in printed
        assert [name for name in entries if not re.search(rf"│ {name} ", printed)] == []


def test_methods_of_a_name_shows_its_fields_with_unit_and_source(gentrain: Command) -> None:
    status, printed = gentrain("methods", "flow_matching")
    assert status == 0
    assert re.search(r"label_dropout │ a number >= 0 and <= 1 │ 0\.1 +│ +│ probability that a label .*│ arXiv:2207\.12598", printed)
    assert re.search(r"beta2 .*│ 0\.999 +│ per step", gentrain("methods", "adamw")[1])
    assert re.search(r"path +│ text +│ required", gentrain("methods", "image_folder")[1])


def test_version_and_the_short_form_of_help(gentrain: Command) -> None:
    assert re.fullmatch(r"gentrain \d+\.\d+\.\d+\n", gentrain("--version")[1])
    assert gentrain("plan", "-h") == gentrain("plan", "--help")


def test_doctor(gentrain: Command) -> None:
    status, printed = gentrain("doctor")
    assert (status, "fail" in printed) in {(0, False), (1, True)}
    assert "python" in printed.lower() and "ray" in printed.lower()


def test_methods_of_a_plugin_are_shown(gentrain: Command, folder: Path) -> None:
    source = "@register('my_flow')\n@dataclass\nclass MyFlow(FlowMatching):\n    '''A flow of mine.'''\n"
    imports = ("dataclasses import dataclass", "gentrain.config import register", "gentrain.methods.flow_matching import FlowMatching")
    (folder / "mine.py").write_text("".join(f"from {line}\n" for line in imports) + source)
    assert "A flow of mine." in gentrain("methods", "plugins=[mine.py]")[1]
    assert "label_dropout" in gentrain("methods", "my_flow", "plugins=[mine.py]")[1]


# --- the way from a configuration to results -------------------------------------------------------------------------------


def test_what_is_told_of_a_configuration_is_told_once(start: Callable[..., subprocess.Popen[str]], folder: Path) -> None:
    (folder / "free.yaml").write_text(TOY.replace("{name: rings, held_out: 200}", "{name: unlabelled, data: rings}"))
    printed, _ = start("train", "free.yaml", "sampler.guidance=3").communicate(timeout=120)
    assert "trained" in printed and printed.count("guidance 3 changes nothing") == 1
    printed, _ = start("sample", "runs/free", "count=4").communicate(timeout=120)
    assert "samples" in printed and printed.count("guidance 3 changes nothing") == 1


@pytest.mark.parametrize("data, message", [
    ("{name: augmented, data: rings, flip: 0.5}", "data: rings has no images"),
    ("{name: resampled, data: rings, balance: given, repeat: {rose: 3}}", "data.repeat: there is no class 'rose'"),
])  # fmt: skip
def test_plan_tells_what_is_wrong_with_the_data_of_a_single_run(gentrain: Command, data: str, message: str) -> None:
    status, printed = gentrain("plan", "toy.yaml", f"data={data}")
    assert status == 2 and message in printed and "not known yet" not in printed


def test_plan_starts_nothing_and_writes_nothing(gentrain: Command, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    status, printed = gentrain("plan", "recipe.yaml", "stages.generator.run.cluster={place: ray, workers: 2}")
    assert status == 0
    assert "output: runs/recipe" in printed and "run: runs/recipe/generator" in printed
    assert "generator: 2 workers under Ray Train, micro-batches of 8" in printed
    status, printed = gentrain("plan", "toy.yaml", "model.width=16")
    assert status == 0 and "toy: this process, micro-batches of 16" in printed
    parameters = re.search(r"│ model │ mlp +│ ([\d,]+) +│ \1 +│ yes", printed)
    assert parameters is not None
    # time 2 (16 16 + 16), labels 4 16, input 2 16 + 16, layer 2 (16 16 + 16), output 16 2 + 2
    assert int(parameters[1].replace(",", "")) == 544 + 64 + 48 + 544 + 34
    assert "toy needs" in printed and "GiB per process while model learns." in " ".join(printed.split())
    for limit, verdict in (("1", ": it fits into 1 GiB."), ("0.00001", ": it does not fit into 1e-05 GiB")):
        status, printed = gentrain("plan", "toy.yaml", "--memory", limit)
        assert status == 0 and verdict in " ".join(printed.split())
    for limit in ("0", "-3", "inf", "nan"):
        status, printed = gentrain("plan", "toy.yaml", "--memory", limit)
        assert status == 2 and "Invalid value for '--memory'" in printed
    assert sorted(folder.rglob("*")) == before
    script = (  # in a process of its own: other tests have imported ray into this one
        "import sys\nfrom gentrain.cli import app\napp(['plan', 'recipe.yaml'], standalone_mode=False)\nassert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, timeout=100, stdout=subprocess.DEVNULL)


def test_from_training_to_a_report(gentrain: Command, folder: Path) -> None:
    assert gentrain("train", "toy.yaml") == (0, "trained: runs/toy\n")
    status, printed = gentrain("sample", "runs/toy", "count=60", "labels=[2]", "seed=4", "sampler.steps=3")
    assert (status, printed) == (0, "samples: runs/toy/generated\n")
    assert json.loads((folder / "runs/toy/generated/info.json").read_text())["sampler"]["steps"] == 3
    drawn = load_file("runs/toy/generated/samples.safetensors")
    assert drawn["x"].shape == (60, 2) and drawn["label"].unique().tolist() == [2]
    status, printed = gentrain("evaluate", "runs/toy", "reference=100")
    assert status == 0 and re.search(r"energy distance, generated +│ \S+ +│ \S+ to \S+ +│ lower", printed)
    assert json.loads((folder / "runs/toy/evaluation/metrics.json").read_text())["settings"]["reference"] == "100 held-out items"
    assert gentrain("report", "runs/toy") == (0, "runs/toy/report.html\n")
    assert "energy distance, generated" in (folder / "runs/toy/report.html").read_text()
    assert gentrain("sample", "runs/toy", "count=3", "--out", "elsewhere")[0] == 0
    assert len(load_file("elsewhere/samples.safetensors")["x"]) == 3
    assert (folder / "runs/toy/evaluation").is_dir()
    assert "removed, since it was of the former samples" in gentrain("sample", "runs/toy", "count=3")[1]
    assert not (folder / "runs/toy/evaluation").exists()
    assert "is a run of flow_matching; a judge is one of `classifier`" in gentrain("evaluate", "runs/toy", "judge=runs/toy")[1]


def test_export(gentrain: Command, folder: Path) -> None:
    assert gentrain("train", "digits.yaml")[0] == 0
    assert gentrain("sample", "runs/digits", "count=60", "sampler.steps=2")[0] == 0
    assert gentrain("evaluate", "runs/digits")[0] == 0
    assert gentrain("export", "runs/digits", "pipeline", "sampler={name: euler, steps: 3}") == (0, "exported: pipeline\n")
    assert (folder / "pipeline/model_index.json").is_file()
    assert "| sliced Wasserstein, generated |" in (folder / "pipeline/README.md").read_text()
    status, printed = gentrain("export", "runs/digits", "pipeline")
    assert status == 2 and "pipeline exists and is not an empty directory; name another" in printed
    status, printed = gentrain("export", "runs/digits", ".")
    assert status == 2 and "error . is no name of a directory to be made; give it one" in printed


def test_samples_are_not_told_to_be_of_weights_that_a_run_published_while_they_were_drawn(
    gentrain: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gentrain("train", "toy.yaml")[0] == 0
    draw = generate_stage.generate

    def late(*arguments: Any) -> Any:
        x = draw(*arguments)
        assert gentrain("train", "toy.yaml", "training.samples=128")[0] == 0
        return x

    monkeypatch.setattr(generate_stage, "generate", late)
    assert gentrain("sample", "runs/toy", "count=60")[0] == 0
    status, printed = gentrain("evaluate", "runs/toy")
    assert status == 2 and "draw and measure anew" in printed, printed


def test_numbers_of_former_weights_are_not_exported(gentrain: Command, folder: Path) -> None:
    """Trained on since: neither are the former samples measured, nor do the former numbers reach a model card."""
    assert gentrain("train", "digits.yaml")[0] == 0
    assert gentrain("sample", "runs/digits", "count=60", "sampler.steps=2")[0] == 0
    assert gentrain("evaluate", "runs/digits")[0] == 0
    assert gentrain("train", "digits.yaml", "training.samples=64")[0] == 0
    for command in (("evaluate", "runs/digits"), ("export", "runs/digits", "pipeline")):
        status, printed = gentrain(*command)
        assert (
            status == 2
            and "of other weights than the run's newest checkpoint; draw and measure anew: gentrain sample runs/digits" in printed
        )
    assert not (folder / "pipeline").exists()
    assert gentrain("sample", "runs/digits", "count=60", "sampler.steps=2")[0] == 0
    assert gentrain("evaluate", "runs/digits")[0] == 0
    assert gentrain("export", "runs/digits", "pipeline", "sampler={name: euler, steps: 3}") == (0, "exported: pipeline\n")


def test_a_recipe_is_run_once(gentrain: Command, folder: Path) -> None:
    status, printed = gentrain("run", "recipe.yaml")
    assert status == 0
    assert "generator: not run yet" in printed and "report: runs/recipe/report.html" in printed
    assert re.search(r"sliced Wasserstein, drawn +│", printed)
    status, printed = gentrain("run", "recipe.yaml")
    assert status == 0 and printed.count("finished before, skipped") == 3
    status, printed = gentrain("run", "recipe.yaml", "stages.drawn.count=70")
    assert status == 0 and "drawn: runs again: count changed" in printed and "generator: finished before, skipped" in printed


def test_a_recipe_that_is_stopped_says_how_to_go_on(gentrain: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from gentrain.training.loop import Outcome

    monkeypatch.setattr("gentrain.recipes.train.launch", lambda run: Outcome.STOPPED)
    status, printed = gentrain("run", "recipe.yaml", "stages.drawn.count=5", "output=my runs")
    assert status == 75
    assert "Go on with: gentrain run recipe.yaml stages.drawn.count=5 'output=my runs'" in printed


@pytest.mark.timeout(400)
@pytest.mark.parametrize("place", ["inline", pytest.param("ray", marks=pytest.mark.cluster)])
def test_ctrl_c_publishes_a_checkpoint_and_the_same_command_goes_on(
    start: Callable[..., subprocess.Popen[str]], folder: Path, place: str
) -> None:
    process = start("train", "toy.yaml", f"cluster.place={place}", "training.samples=100_000_000")
    metrics = folder / "runs/toy/metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.is_file() or metrics.stat().st_size < 500:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert bool(children) == (place == "ray")
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 75, printed
    assert f"Go on with: gentrain train toy.yaml cluster.place={place} training.samples=100_000_000" in printed
    assert psutil.wait_procs(children, timeout=20)[1] == []
    stopped = newest(folder / "runs/toy")
    assert stopped is not None and 0 < int(stopped.name) < 100_000_000
    process = start("train", "toy.yaml", f"training.samples={int(stopped.name) + 160}")
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    lines = [json.loads(line)["samples"] for line in metrics.read_text().splitlines()]
    assert lines == list(range(16, int(stopped.name) + 161, 16))


def on_two_ranks(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`gentrain` with these arguments under torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    agent = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", port]
    command = [*agent, "--no-python", str(Path(sys.executable).with_name("gentrain")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return done


def changed(directory: Path) -> list[tuple[int, dict[str, list[object]]]]:
    """What attempts.jsonl says of settings that became others: (samples seen, key -> [before, then])."""
    lines = map(json.loads, (directory / ATTEMPTS).read_text().splitlines())
    return [(line["samples"], line["settings"]) for line in lines if line["event"] == "changed"]


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_run_goes_on_with_another_engine(gentrain: Command, folder: Path) -> None:
    """One process, two ranks of ZeRO 2, two of ZeRO 3, one process: the weights of a run that never stopped, to rounding."""
    assert gentrain("train", "toy.yaml", "output=parts") == (0, "trained: parts\n")
    sharded = "engine={name: deepspeed, zero_stage: %d}"
    second = on_two_ranks("train", "toy.yaml", "output=parts", "training.samples=128", sharded % 2)
    said = " ".join(second.stderr.split())
    assert said.count('from sample 64 on with other settings: engine.name: "torch" -> "deepspeed"') == 1, said
    on_two_ranks("train", "toy.yaml", "output=parts", "training.samples=192", sharded % 3)
    assert gentrain("train", "toy.yaml", "output=parts", "training.samples=256")[0] == 0
    away = {"engine.name": ["torch", "deepspeed"], "engine.offload_optimizer": [None, False], "engine.zero_stage": [None, 2]}
    back = {"engine.name": ["deepspeed", "torch"], "engine.offload_optimizer": [False, None], "engine.zero_stage": [3, None]}
    assert changed(folder / "parts") == [(64, away), (128, {"engine.zero_stage": [2, 3]}), (192, back)]
    assert gentrain("train", "toy.yaml", "output=whole", "training.samples=256")[0] == 0
    assert 0 < difference(state_of(folder / "parts"), state_of(folder / "whole")) <= 4e-6  # the gate measures it
    assert [line["samples"] for line in records(folder / "parts")] == list(range(16, 257, 16))
    status, printed = gentrain("train", "toy.yaml", "output=parts", sharded % 2, "training.samples=512", "model.width=16")
    assert status == 2 and "holds a run with another model.width; name another directory" in printed
    status, printed = gentrain("train", "toy.yaml", "output=parts", "training.samples=256", "engine.precision=bf16")
    assert status == 2 and "training.samples: parts has seen its 256 samples, so that another engine.precision would change noth" in printed
    assert (folder / "parts/config.yaml").read_text().count("precision: fp32") == 1
    assert gentrain("train", "toy.yaml", "output=parts", "training.samples=320", "engine.precision=bf16")[0] == 0
    assert gentrain("train", "toy.yaml", "output=whole", "training.samples=320")[0] == 0
    assert changed(folder / "parts")[3:] == [(256, {"engine.precision": ["fp32", "bf16"]})]
    assert 1e-6 < difference(state_of(folder / "parts"), state_of(folder / "whole")) <= 4e-2  # the gate measures it: four steps in bf16


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_ranks_of_torchrun_train_what_one_process_trains(gentrain: Command, folder: Path) -> None:
    done = on_two_ranks("train", "toy.yaml", "output=two")
    assert done.stdout.count("trained: two") == 1
    assert gentrain("train", "toy.yaml", "output=one")[0] == 0
    one, two = (
        [json.loads(line)["loss/model"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-5)


# --- mistakes ---------------------------------------------------------------------------------------------------------------

# arguments, exit status, what is said
MISTAKES = [
    (["trian", "toy.yaml"], 2, "No such command 'trian'"),
    (["train"], 2, "Missing argument 'config'. See gentrain --help."),
    (["train", "toy.yml"], 2, "toy.yml: no such file; did you mean toy.yaml?"),
    (["train", "toy.yaml", "modle.width=2"], 2, "command line: modle: unknown key; did you mean 'model'?"),
    (["train", "toy.yaml", "model=cnn"], 2, "runs/toy: model: a network that denoises is needed, and cnn does not"),
    (["train", "toy.yaml", "roles.model.weights=nowhere"], 2, "roles.model.weights: nowhere is not a run's directory"),
    (["train", "recipe.yaml"], 2, "this is a recipe, not a run; run it with: gentrain run recipe.yaml"),
    (["run", "toy.yaml"], 2, "this is a run, not a recipe; train it with: gentrain train toy.yaml"),
    (["run", "recipe.yaml", "stages.drawn.labels=[7]"], 2, "class 7 does not exist; those of runs/recipe/generator are 0 to 2"),
    (["plan", "toy.yaml", "model=unet"], 2, "unet is for images (C, H, W)"),
    (["plan", "nowhere.yaml"], 2, "nowhere.yaml: no such file"),
    (["methods", "flow_machting"], 2, "nothing is called 'flow_machting'; did you mean 'flow_matching'?"),
    (["methods", "plugin=[mine.py]"], 2, "command line: plugin: unknown key; did you mean 'plugins'?"),
    (["methods", "plugins=[nowhere.py]"], 2, "command line: plugins[0]: plugin 'nowhere.py' failed to import"),
    (["sample", "nowhere"], 2, "nowhere is not a run's directory: it has no config.yaml"),
    (["evaluate", "nowhere"], 2, "nowhere is not a run's directory: it has no config.yaml"),
    (["export", "nowhere", "out"], 2, "nowhere is not a run's directory: it has no config.yaml"),
    (["report", "nowhere"], 2, "nowhere: no such run; name the directory of a run or a recipe"),
    (["sample", "untrained"], 2, "untrained has no checkpoint yet; train it first"),
    (["sample", "untrained", "cuont=3"], 2, "command line: cuont: unknown key; did you mean 'count'?"),
    (["sample", "untrained", "labels=[-1]"], 2, "labels[0]: expected a list, each a whole number >= 0 or null, got -1"),
    (["evaluate", "untrained"], 2, "untrained/generated/samples.safetensors does not exist"),
    (["evaluate", "untrained", "judge=nowhere"], 2, "nowhere is not a run's directory"),
]


@pytest.mark.parametrize("arguments, status, message", MISTAKES, ids=[" ".join(row[0]) for row in MISTAKES])
def test_a_mistake_gets_one_clear_line(gentrain: Command, folder: Path, arguments: list[str], status: int, message: str) -> None:
    (folder / "untrained").mkdir()
    (folder / "untrained/config.yaml").write_text(TOY)
    got, printed = gentrain(*arguments)
    assert (got, printed.count("error")) == (status, 1)
    assert message in printed
    assert len(printed.splitlines()) <= 10


def test_a_damaged_checkpoint_is_named(gentrain: Command, folder: Path) -> None:
    assert gentrain("train", "toy.yaml")[0] == 0
    (newest(folder / "runs/toy") / "model.ema.00000.safetensors").write_bytes(b"x")
    for command in ("train toy.yaml", "sample runs/toy"):
        status, printed = gentrain(*command.split())
        assert status == 2 and "model.ema.00000.safetensors differs from its hash in the manifest" in printed


@pytest.mark.parametrize(
    "error", [SafetensorError("Error while serializing: No space left on device (os error 28)"), OSError(errno.ENOSPC, "No space left")]
)
def test_a_full_disk_is_told_with_the_remedy_by_whatever_writes(
    gentrain: Command, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object) -> None:
        raise error

    assert gentrain("train", "toy.yaml")[0] == 0
    monkeypatch.setattr(generate_stage, "save_file", full)
    status, printed = gentrain("sample", "runs/toy", "count=4")
    assert status == 1 and str(error) in printed and "; the disk is full: free some space" in printed


def test_samples_that_are_no_numbers_are_told_without_a_traceback(gentrain: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise FloatingPointError("3 of 4 samples came out as NaN")

    assert gentrain("train", "toy.yaml")[0] == 0
    monkeypatch.setattr(generate_stage, "generate", lost)
    assert gentrain("sample", "runs/toy", "count=4") == (1, "error 3 of 4 samples came out as NaN\n")


def test_a_directory_that_was_removed_below_the_shell_is_told(gentrain: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "gone").mkdir()
    monkeypatch.chdir(folder / "gone")
    (folder / "gone").rmdir()
    monkeypatch.setattr("gentrain.recipes.base.is_recipe", lambda *_: Path("x").resolve())
    status, printed = gentrain("train", str(folder / "toy.yaml"))
    assert status == 1 and "was the directory that this shell is in removed? Change to another one" in printed


def test_fewer_samples_than_a_run_has_seen_are_refused(gentrain: Command) -> None:
    assert gentrain("train", "toy.yaml")[0] == 0
    status, printed = gentrain("train", "toy.yaml", "training.samples=48")
    assert status == 2 and "training.samples: runs/toy has seen 64 samples already, more than 48; raise it to go on, or name" in printed
    assert gentrain("train", "toy.yaml", "training.samples=49") == (0, "trained: runs/toy\n")  # whole batches: the same 64


# what a launcher sets, which of it is named, what is said of it
MISPLACED = [
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE", "expected a whole number >= 1, got 'two'"),
    ({"RANK": "", "WORLD_SIZE": "1"}, "RANK", "expected a whole number from 0 to 0, got ''"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK", "expected a whole number from 0 to 1, got '2'"),
    ({"WORLD_SIZE": "2"}, "RANK", "not set, though WORLD_SIZE is 2"),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK", "expected a whole number >= 0, got '-1'"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR", "not set, though WORLD_SIZE is 2"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "http"}, "MASTER_PORT", "from 1 to 65535, got 'http'"),
]


@pytest.mark.parametrize("variables, name, said", MISPLACED)
def test_variables_that_no_launcher_sets_are_named(
    gentrain: Command, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str, said: str
) -> None:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    status, printed = gentrain("train", "toy.yaml")
    assert status == 2 and f"environment: {name}: " in printed and said in printed and "let torchrun set it, or unset RANK" in printed


def test_what_cannot_be_exported_is_told(gentrain: Command) -> None:
    assert gentrain("train", "toy.yaml")[0] == 0
    assert gentrain("export", "runs/toy", "out") == (
        1,
        "error only the networks unet and dit can be exported to diffusers, this one is a MLPNetwork\n",
    )
