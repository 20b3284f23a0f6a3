"""Sweeps: what is drawn, when trials are compared, and that what is interrupted goes on as if it had not been."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from gentrain import cli
from gentrain.cluster import tune
from gentrain.cluster.attempts import ATTEMPTS
from gentrain.cluster.launch import launch
from gentrain.cluster.ray_train import workers_with_room
from gentrain.cluster.session import session
from gentrain.cluster.stopping import STOP_FILE, StopFlag
from gentrain.cluster.sweeps import Journal, LoadedSweep, Range, Sweep, load_sweep, read_record
from gentrain.cluster.tune import _at_a_time, _scheduler, advance, run_sweep, run_trial
from gentrain.config import ConfigError, to_dict
from gentrain.report import SWEEP, write_report
from gentrain.training.cluster import Cluster
from gentrain.training.lock import hold
from gentrain.training.run import CHECKPOINTS, METRICS, load_run

LEARNING_RATES = [1e-2, 1e-3, 1e-5, 1e-6]  # the first is the best by far, at every comparison
TOY: dict[str, Any] = {
    "method": "flow_matching",
    "data": "rings",
    "model": {"name": "mlp", "width": 16},
    "engine": "torch",
    "training": {"samples": 1280, "batch_size": 32, "log_every": 160, "checkpoint_every": 160},
    "sweep": {"metric": "loss/model", "choices": {"optimizer.lr": LEARNING_RATES}, "grace": 320, "reduction": 2},
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def file(name: str = "toy.yaml", sweep: dict[str, Any] | None = None, **values: Any) -> Path:
        whole = {**TOY, **values, "sweep": {**TOY["sweep"], **(sweep or {})}}
        Path(name).write_text(yaml.safe_dump(whole))
        return Path(name)

    return file


def _rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]


def _advance(sweep: LoadedSweep, number: int) -> dict[str, Any]:
    trial = sweep.trials[number]
    return advance(to_dict(trial.run), sweep.directory, trial.name, sweep.settings)


# --- Ray Tune, first: Ray reads its environment when it is imported ----------------------------------------------------------


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    with session():
        yield


@pytest.mark.cluster
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("ray_session")
def test_a_sweep_that_was_cut_off_goes_on_under_ray_tune(write: Write) -> None:
    cut_off_and_gone_on(write, workers=0)


def cut_off_and_gone_on(write: Write, workers: int) -> None:
    """One trial has finished and is kept, one goes on from its checkpoint, two have not begun; the poor ones are stopped early.

    Args:
        workers: of Ray Train, of each trial from then on; 0 = an actor of Tune. Before, trials trained in this process.
    """
    path = write(sweep={"concurrent": 1})
    sweep = load_sweep(path)
    journal = Journal(sweep)
    for _ in range(3):
        told = _advance(sweep, 0)
        journal.note("000", "finished" if told["done"] else "running", (told["samples"], told["value"]))
    told = _advance(sweep, 1)
    journal.note("001", "running", (told["samples"], told["value"]))
    kept = (sweep.directory / "trials/000" / METRICS).stat().st_mtime_ns
    sweep = load_sweep(path, ["cluster.place=ray", f"cluster.workers={workers}", "cluster.network.interface=lo"] if workers else [])
    journal = run_sweep(sweep)
    record = read_record(sweep.directory)["trials"]
    assert [trial["status"] for trial in record.values()] == ["finished", "stopped early", "stopped early", "stopped early"]
    assert [[samples for samples, _ in trial["rungs"]] for trial in record.values()] == [[320, 640, 1280], [320, 640], [320], [320]]
    assert (sweep.directory / "trials/000" / METRICS).stat().st_mtime_ns == kept
    started = [json.loads(line) for line in (sweep.directory / "trials/001" / ATTEMPTS).read_text().splitlines()]
    assert [(line["samples"], line["ranks"]) for line in started if line["event"] == "started"] == [(0, 1), (320, max(workers, 1))]
    for trial in sweep.trials:
        assert (trial.run.directory / CHECKPOINTS / f"{record[trial.name]['rungs'][-1][0]:012d}").is_dir()
    assert journal.unfinished() == [] and run_sweep(sweep).ranking()[0] == "000"  # nothing left to do: no Ray


# --- what is drawn ----------------------------------------------------------------------------------------------------------


def test_every_combination_of_choices_or_as_many_draws_as_asked_for() -> None:
    assert Sweep(metric="m", choices={"a": [1, 2], "b": ["x", "y"]}).drawn() == [
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"},
    ]  # fmt: skip
    settings = {"metric": "m", "choices": {"a": [1, 2, 3]}, "ranges": {"b": Range(0.0, 1.0)}}
    few, more = Sweep(**settings, trials=5).drawn(), Sweep(**settings, trials=9).drawn()
    assert more[:5] == few and len({trial["b"] for trial in more}) == 9
    assert Sweep(**settings, trials=5, seed=1).drawn() != few


def test_ranges_are_drawn_evenly_on_their_scale() -> None:
    """Mean and variance of a uniform variable: 1/2 and 1/12, each within 5 standard errors of 2,000 draws."""
    cases = {"linear": (Range(-2.0, 6.0), lambda x: (x + 2) / 8), "log": (Range(1e-5, 1e-1, "log"), lambda x: math.log10(x * 1e5) / 4)}
    for range_, unit in cases.values():
        drawn = [range_.draw(random) for random in _randoms(2_000)]
        assert all(range_.low <= value <= range_.high for value in drawn)
        units = [unit(value) for value in drawn]
        assert sum(units) / 2_000 == pytest.approx(1 / 2, abs=5 * math.sqrt(1 / 12 / 2_000))
        assert sum((u - 0.5) ** 2 for u in units) / 2_000 == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / 2_000))
    whole = [Range(1, 3).draw(random) for random in _randoms(300)]
    assert set(whole) == {1, 2, 3} and all(isinstance(value, int) for value in whole)
    assert {Range(1, 100, "log").draw(random) for random in _randoms(300)} <= set(range(1, 101))


def _randoms(count: int) -> list[Any]:
    from gentrain.cluster.sweeps import _random

    return [_random(0, number, "key") for number in range(count)]


def test_trials_are_compared_at_grace_times_powers_of_the_reduction() -> None:
    assert Sweep(metric="m", choices={"a": [1]}, grace=100, reduction=3).rungs(2_700) == [100, 300, 900]
    assert Sweep(metric="m", choices={"a": [1]}, grace=100, reduction=1.5).rungs(300) == [100, 150, 225]
    assert Sweep(metric="m", choices={"a": [1]}).rungs(2_700) == []


# --- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, key, says",
    [
        ({"choices": {}}, "sweep.choices", "nothing varies"),
        ({"choices": {"seed": []}}, "sweep.choices.seed", "is empty"),
        ({"choices": {"output": ["a"]}}, "sweep.choices.output", "the same for all trials"),
        ({"ranges": {"optimizer.lr": {"low": 1, "high": 2}}, "trials": 2}, "sweep.ranges.optimizer.lr", "has choices already"),
        ({"ranges": {"seed": {"low": 0, "high": 9}}}, "sweep.trials", "say how many"),
        ({"ranges": {"seed": {"low": 9, "high": 0}}, "trials": 2}, "sweep.ranges.seed.low", "low < high"),
        ({"ranges": {"seed": {"low": 0, "high": 9, "scale": "log"}}, "trials": 2}, "sweep.ranges.seed.low", "low > 0"),
        ({"ranges": {"seed": {"low": 0.0, "high": math.inf}}, "trials": 2}, "sweep.ranges.seed.low", "low < high"),
        ({"trials": 1_001}, "sweep.trials", "more than 1,000"),
        ({"reduction": 1}, "sweep.reduction", "> 1"),
        ({"metrik": "x"}, "sweep.metrik", "did you mean 'metric'"),
        ({"choices": {"optimizer.lrr": [1]}}, "optimizer.lrr", r"trial 000 \(optimizer.lrr=1\): unknown key; did you mean 'lr'"),
        ({"choices": {"training.batch_size": [32, -1]}}, "training.batch_size", r"trial 001 \(training.batch_size=-1\)"),
        ({"grace": 100}, "training.log_every", "nothing is logged within 100 samples"),
    ],
)
def test_a_mistaken_section_is_refused_with_its_key(write: Write, changes: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load_sweep(write(sweep=changes))
    assert caught.value.key == key and caught.value.source


def test_what_is_no_sweep_and_what_no_trial_can_be(write: Write) -> None:
    path = write()
    with pytest.raises(ConfigError, match="run it with: gentrain sweep"):
        load_run(path)
    with pytest.raises(ConfigError, match="all trials would share it"):
        load_sweep(path, ["training.checkpoints=/elsewhere"])
    Path("run.yaml").write_text(yaml.safe_dump({key: value for key, value in TOY.items() if key != "sweep"}))
    with pytest.raises(ConfigError, match="add a section `sweep:`"):
        load_sweep("run.yaml")


def test_a_sweep_is_planned_and_sent_whole(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """From what is sent the same trials follow as from the file; what would not is refused."""
    path = write(sweep={"choices": {"optimizer.lr": LEARNING_RATES, "model": ["mlp"]}})
    for command in ("plan", "submit"):
        arguments = [command, str(path), *(["--dry-run", "cluster.submit.name=slurm"] if command == "submit" else [])]
        assert cli._guarded(lambda arguments=arguments, **options: cli.app(args=arguments, **options)) == 0
    printed = capsys.readouterr().out
    assert "first of 4 trials" in printed and "command=(gentrain sweep config.yaml)" in printed
    sent = printed.split("# --- config.yaml\n")[1].split("# --- job.sbatch")[0]
    Path("sent.yaml").write_text(sent)
    for there, here in zip(load_sweep("sent.yaml").trials, load_sweep(path).trials, strict=True):
        values, known = to_dict(there.run), to_dict(here.run)
        assert values.pop("output").endswith(known.pop("output")) and values == known
    path = write(seed="${training.batch_size}", sweep={"choices": {"training.batch_size": [32, 64]}})
    assert [trial.run.seed for trial in load_sweep(path).trials] == [32, 64]
    assert cli._guarded(lambda **options: cli.app(args=["submit", str(path), "--dry-run"], **options)) == cli.MEND
    assert "takes it from a key that varies" in capsys.readouterr().err


# --- a trial ----------------------------------------------------------------------------------------------------------------


def test_a_trial_that_is_compared_on_the_way_is_the_run_that_is_not(write: Write) -> None:
    sweep = load_sweep(write())
    journal = Journal(sweep)
    told = []
    while not told or not told[-1]["done"]:
        told.append(_advance(sweep, 0))
        again = _advance(sweep, 0)  # as after a death between the checkpoint and the record
        assert again == told[-1]
        journal.note("000", "running", (told[-1]["samples"], told[-1]["value"]))
    assert [(result["told"], result["samples"]) for result in told] == [("compared", 320), ("compared", 640), ("finished", 1280)]
    whole = load_sweep("toy.yaml", ["output=runs/whole"]).trials[0].run
    launch(whole)
    losses = [[row["loss/model"] for row in _rows(run.directory)] for run in (sweep.trials[0].run, whole)]
    assert losses[0] == losses[1]
    assert [result["value"] for result in told] == [losses[0][1], losses[0][3], losses[0][7]]


def test_a_metric_that_is_not_logged_is_told_at_the_first_line(write: Write) -> None:
    sweep = load_sweep(write(sweep={"metric": "loss/modle"}))
    Journal(sweep)
    told = _advance(sweep, 0)
    assert told["told"] == "ConfigError" and "sweep.metric: metrics.jsonl has no 'loss/modle'; name what it has" in told["error"]
    assert not (sweep.trials[0].run.directory / METRICS).exists() or len(_rows(sweep.trials[0].run.directory)) == 1


def test_a_trial_that_diverges_is_over_and_no_other(write: Write) -> None:
    sweep = load_sweep(write(sweep={"choices": {"optimizer.lr": [1e30]}}))
    Journal(sweep)
    told = _advance(sweep, 0)
    assert told["told"] == "diverged" and told["done"], told


# --- the record and the scheduler -------------------------------------------------------------------------------------------


def test_what_tune_cannot_begin_with_is_told_as_it_is(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = load_sweep(write())

    def fail(*_: Any) -> None:
        raise FileNotFoundError("no such directory")

    monkeypatch.setattr(tune, "_fit", fail)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        tune._tune(sweep, Journal(sweep), StopFlag())


def test_the_record_goes_on_and_refuses_another_sweep(write: Write) -> None:
    sweep = load_sweep(write())
    journal = Journal(sweep)
    journal.note("000", "finished", (1280, 0.5))
    journal.note("001", "running", (320, 0.9))
    journal.note("002", "stopped early", (320, 1.5))
    journal.note("003", "failed", error="lost")
    again = Journal(sweep)
    again.pause()
    assert [trial.name for trial in again.unfinished()] == ["001", "003"] and again.of("001")["status"] == "waiting"
    assert again.ranking() == ["000", "001", "002", "003"]
    more = Journal(load_sweep(write(sweep={"choices": {"optimizer.lr": [*LEARNING_RATES, 1.0]}})))
    assert more.of("004")["status"] == "waiting" and more.of("000")["rungs"] == [(1280, 0.5)]
    for other in ({"grace": 640}, {"metric": "grad_norm/model"}, {"choices": {"optimizer.lr": [1.0] * 5}}):
        with pytest.raises(ConfigError, match="holds a sweep with another"):
            Journal(load_sweep(write(sweep=other)))
    (sweep.directory / SWEEP).write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        Journal(sweep)


@pytest.mark.parametrize("best_is, sign", [("lowest", 1), ("highest", -1)])
def test_who_comes_later_is_compared_with_those_of_the_record(write: Write, best_is: str, sign: int) -> None:
    """With reduction 2 a trial goes on when it is no worse than the median of those before it at the same rung."""
    sweep = load_sweep(write(sweep={"best_is": best_is}))
    journal = Journal(sweep)
    for name, value in (("000", 1.0), ("001", 2.0), ("002", 3.0)):
        journal.note(name, "running", (320, sign * value))
    scheduler = _scheduler(sweep, journal)
    decisions = []
    for number, value in enumerate([2.5, 1.9, 2.4]):  # medians 2, 2.25 and 2
        trial = SimpleNamespace(trial_id=f"new {number}")
        scheduler.on_trial_add(None, trial)
        result = {"samples": 320, "value": sign * value}
        decisions.append(scheduler.on_trial_result(None, trial, result))
        scheduler.on_trial_complete(None, trial, result | {"samples": 1280, "value": sign * -99.0})
    assert decisions == ["STOP", "CONTINUE", "STOP"]


def test_a_trial_that_was_resumed_leaves_its_last_value_at_no_lower_comparison(write: Write) -> None:
    """Ray's own scheduler would note it there, since it knows such a trial by another name: its later value, which nobody can match."""
    sweep = load_sweep(write())
    journal = Journal(sweep)
    journal.note("000", "running", (320, 1.0))
    scheduler = _scheduler(sweep, journal)
    resumed, later = SimpleNamespace(trial_id="of this session"), SimpleNamespace(trial_id="later")
    result = {"samples": 640, "value": 0.1}
    scheduler.on_trial_add(None, resumed)
    assert scheduler.on_trial_result(None, resumed, result) == "CONTINUE"
    scheduler.on_trial_complete(None, resumed, result)
    scheduler.on_trial_add(None, later)
    assert scheduler.on_trial_result(None, later, {"samples": 320, "value": 0.9}) == "CONTINUE"  # beside 1.0; with 0.1 the median is 0.55


# --- groups of workers, and arrays ------------------------------------------------------------------------------------------


def test_as_many_trials_at_a_time_as_there_is_room_for_their_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of 8 cores and 4 GPUs, of 6 and none, one that is lost, and a head that takes no work."""
    import ray

    resources = [({"CPU": 8.0, "GPU": 4.0}, True), ({"CPU": 6.0}, True), ({"CPU": 99.0}, False), ({"memory": 1.0}, True)]
    monkeypatch.setattr(ray, "nodes", lambda: [{"Resources": each, "Alive": alive} for each, alive in resources])
    cases = [
        ({"cpus_per_worker": 4}, 3),  # 2 and 1: none is shared by two nodes
        ({"cpus_per_worker": 1}, 14),
        ({"cpus_per_worker": 2, "gpus_per_worker": 0.1}, 4),
        ({"cpus_per_worker": 1, "gpus_per_worker": 0.5}, 8),
        ({"cpus_per_worker": 9}, 0),
    ]
    for settings, room in cases:
        assert workers_with_room(Cluster(place="ray", **settings)) == room, settings
    for workers, concurrent, expected in ((3, None, 4), (3, 2, 2), ((1, 7), 9, 2), (20, None, 1)):
        assert _at_a_time(concurrent, Cluster(place="ray", workers=workers)) == expected
    assert _at_a_time(None, Cluster()) is None and _at_a_time(3, Cluster()) == 3  # Tune counts actors itself


def test_trials_of_an_array_are_compared_through_the_record_alone(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in its turn, as tasks of an array with at_once: 1: who comes first is finished, those that are worse than the median stop."""
    sweep = load_sweep(write())
    assert [run_trial(sweep, number) for number in range(4)] == ["finished", "stopped early", "stopped early", "stopped early"]
    record = read_record(sweep.directory)["trials"]
    assert [[samples for samples, _ in trial["rungs"]] for trial in record.values()] == [[320, 640, 1280], [320], [320], [320]]
    before = (sweep.directory / SWEEP).read_text()
    assert run_trial(sweep, 1) == "stopped early" and (sweep.directory / SWEEP).read_text() == before  # a task that is requeued
    monkeypatch.setattr(tune, "_RECORD_S", 0.1)
    with hold(sweep.directory), pytest.raises(ConfigError, match="is in use by"):  # by gentrain sweep
        run_trial(sweep, 0)


def test_a_trial_of_an_array_that_is_asked_to_stop_waits_and_one_that_cannot_train_is_told(write: Write) -> None:
    sweep = load_sweep(write(sweep={"grace": None}, training={**TOY["training"], "samples": 1_000_000}))
    trial = sweep.trials[2].run

    def ask() -> None:
        while not (trial.directory / METRICS).exists():
            time.sleep(0.01)
        (trial.directory / STOP_FILE).touch()

    thread = threading.Thread(target=ask)
    thread.start()
    status = run_trial(sweep, 2)
    thread.join()
    assert status == read_record(sweep.directory)["trials"]["002"]["status"] == "waiting"
    assert any((trial.directory / CHECKPOINTS).iterdir())
    mistaken = load_sweep(write("other.yaml", sweep={"metric": "loss/modle"}))
    with pytest.raises(ConfigError, match=r"metrics.jsonl has no 'loss/modle'"):
        run_trial(mistaken, 0)


def test_the_command_of_an_array_task(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write()
    for number, status, told in (("0", 0, "trial 000: finished"), ("4", cli.MEND, "there is no trial 4: runs/toy has 4, 0 to 3")):
        arguments = ["sweep", str(path), f"--trial={number}"]
        assert cli._guarded(lambda arguments=arguments, **options: cli.app(args=arguments, **options)) == status
        printed = capsys.readouterr()
        assert told in printed.out + printed.err
    assert Path("runs/toy/report.html").is_file()


# --- the report -------------------------------------------------------------------------------------------------------------


def test_the_report_lists_trials_and_draws_their_metric(tmp_path: Path) -> None:
    trials = {
        "000": {"parameters": {"lr": 0.1}, "status": "stopped early", "rungs": [[2, 3.0]]},
        "001": {"parameters": {"lr": "<b>"}, "status": "finished", "rungs": [[2, 2.0], [4, 1.25]]},
        "002": {"parameters": {"lr": 9}, "status": "diverged", "rungs": [], "error": "<i>nan</i>"},
        "003": {"parameters": [], "status": ["x"], "rungs": "damaged"},
        "../004": {"parameters": {}, "status": "finished", "rungs": [[9, 0.0]]},
    }
    (tmp_path / SWEEP).write_text(json.dumps({"settings": {"metric": "loss/m", "best_is": "lowest"}, "trials": trials}))
    for name, count in (("000", 2), ("001", 4)):
        (tmp_path / "trials" / name).mkdir(parents=True)
        rows = [{"samples": n + 1, "loss/m": 5.0 - n} for n in range(count)]
        (tmp_path / "trials" / name / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path).read_text()
    assert "<b>" not in page.split("<table>")[1].split("</table>")[0].replace("<strong>", "") and "&lt;i&gt;nan" in page
    assert "004" not in page.split("<table>")[1].split("</table>")[0]
    cells = [row.split("<td>")[1].split("</td>")[0] for row in page.split("<tbody>")[1].split("</tbody>")[0].split("<tr>")[1:]]
    assert cells == ["001", "000", "002", "003"]  # more samples first, then the better value
    assert "not finite" not in page and page.count('<path d="M') >= 2
