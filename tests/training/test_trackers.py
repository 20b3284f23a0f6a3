"""Trackers: what they are told, that one which fails hurts nobody, and the services themselves where their packages are installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gentrain.config import ConfigError, option, register
from gentrain.training.callbacks import MetricsFile, Previews, Trackers
from gentrain.training.loop import train
from gentrain.training.settings import weight_settings
from gentrain.training.trackers import Tracked, Tracker, Tracking
from gentrain.training.trackers.tensorboard import TensorBoard
from gentrain.training.world import World
from tests.distributed.cases import records, run_of, values

ALONE = World(0, 1, torch.device("cpu"))
TOLD: dict[str, list[Any]] = {}


class _Telling(Tracking):
    def __init__(self, tracker: Recorder, run: Tracked):
        self.tracker, self.told = tracker, TOLD.setdefault(tracker.key, [])
        self.told.append(("start", run))
        self._fail("start")

    def _fail(self, what: str) -> None:
        if self.tracker.fails == what:
            raise ConnectionError("no service\nat all")

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        self.told.append(("scalars", dict(values), samples))
        self._fail("scalars")

    def image(self, file: Path, samples: int) -> None:
        self.told.append(("image", file.read_bytes()[:4], samples))
        self._fail("image")

    def close(self) -> None:
        self.told.append(("close",))
        self._fail("close")


@register("recorder")
@dataclass
class Recorder(Tracker):
    key: str = option("one")
    fails: str = option("")

    def start(self, run: Tracked) -> Tracking:
        return _Telling(self, run)


@pytest.fixture(autouse=True)
def nothing_told() -> None:
    TOLD.clear()


def settings(output: Path, *trackers: Any, **training: Any) -> dict[str, Any]:
    return values(output, "flow_matching", samples=36, preview_every=24, preview_count=4, **training) | {
        "data": "digits", "model": {"name": "unet", "channels": [8], "attention": []}, "sampler": {"name": "euler", "steps": 2},
        "trackers": list(trackers),
    }  # fmt: skip


def trained(settings: dict[str, Any], stop_after: int | None = None) -> None:
    steps = iter(range(1000))
    train(run_of(settings), ALONE, lambda: stop_after is not None and next(steps) >= stop_after, [MetricsFile, Previews, Trackers])


def test_every_tracker_is_told_every_number_image_and_the_configuration(tmp_path: Path) -> None:
    trained(settings(tmp_path, {"name": "recorder"}, {"name": "recorder", "key": "two"}))
    assert TOLD["one"] == TOLD["two"]
    (_, run), *told, last = TOLD["one"]
    assert run.directory == tmp_path and run.config["method"]["name"] == "flow_matching" and run.samples == 0 and len(run.identity) == 16
    lines = records(tmp_path)
    scalars = [entry for entry in told if entry[0] == "scalars"]
    assert [samples for _, _, samples in scalars] == [line["samples"] for line in lines] == [12, 24, 36]
    for (_, numbers, _), line in zip(scalars, lines):
        assert {key: numbers[key] for key in line if key != "samples"} == {key: v for key, v in line.items() if key != "samples"}
    assert [entry for entry in told if entry[0] == "image"] == [("image", b"\x89PNG", 24)] and last == ("close",)


def test_an_attempt_that_goes_on_is_the_same_run(tmp_path: Path) -> None:
    trained(settings(tmp_path, {"name": "recorder"}), stop_after=2)
    trained(settings(tmp_path, {"name": "recorder", "key": "again"}))
    first, second = TOLD["one"][0][1], TOLD["again"][0][1]
    assert first.identity == second.identity and (first.samples, second.samples) == (0, 24)
    assert [entry[2] for entry in TOLD["again"] if entry[0] == "scalars"] == [36]


@pytest.mark.parametrize("fails", ["start", "scalars", "image", "close"])
def test_one_that_fails_is_told_of_once_and_hurts_nobody(fails: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(settings(tmp_path, {"name": "recorder", "key": "bad", "fails": fails}, {"name": "recorder"}))
    assert [entry[0] for entry in TOLD["one"]] == ["start", "scalars", "scalars", "image", "scalars", "close"]
    assert TOLD["bad"][-1][0] == fails and [entry[0] for entry in TOLD["bad"]].count(fails) == 1
    said = [message for message in caplog.messages if "recorder (trackers[0]) is out of use" in message]
    assert len(said) == 1 and said[0].endswith("ConnectionError: no service at all")


def test_only_rank_0_tracks(tmp_path: Path) -> None:
    run = run_of(settings(tmp_path, {"name": "recorder"}))
    other = SimpleNamespace(run=run, world=World(1, 2, torch.device("cpu")), clock=SimpleNamespace(samples=0))
    Trackers(other)  # type: ignore[arg-type]
    assert TOLD == {}


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    run = run_of(settings(tmp_path, {"name": "recorder"}))
    trainer: Any = SimpleNamespace(run=run, world=ALONE, clock=SimpleNamespace(samples=0))
    Trackers(trainer).on_log(trainer, {"samples": 5, "a": 1.0, "b": float("nan")})
    assert TOLD["one"][1] == ("scalars", {"a": 1.0}, 5)


def test_a_package_that_is_missing_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "package", ("no_such_package", "extra"))
    with pytest.raises(ConfigError, match=r"trackers\[0\]: the package no_such_package is not installed; pip install 'gentrain\[extra\]'"):
        trained(settings(tmp_path, {"name": "recorder"}))


def test_trackers_may_change_while_a_run_goes_on(tmp_path: Path) -> None:
    one, two = (weight_settings(run_of(settings(tmp_path, *trackers))) for trackers in ((), ("tensorboard", {"name": "recorder"})))
    assert one == two


def test_what_came_from_the_environment_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKER_TOKEN", "secret-word")
    trained(settings(tmp_path, {"name": "recorder", "fails": "${oc.env:TRACKER_TOKEN}"}))
    assert "secret-word" not in str(TOLD["one"][0][1].config) and "TRACKER_TOKEN" in str(TOLD["one"][0][1].config)


def test_tensorboard_gets_numbers_images_and_the_configuration(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(settings(tmp_path, "tensorboard"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for line in records(tmp_path):
        for key in line.keys() - {"samples"}:
            assert any(event.step == line["samples"] and abs(event.value - line[key]) < 1e-6 for event in events.Scalars(key))
    assert [image.step for image in events.Images("samples")] == [24]
    assert b"flow_matching" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def installed(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Of a stand-in: it is found."""
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: package if name == package else found(name, *args))


def test_tensorboard_forgets_what_an_attempt_wrote_after_the_checkpoint_that_the_next_one_goes_on_from(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begins, seen in ((0, (12, 24, 36)), (12, (24,))):
        tracking = TensorBoard().start(Tracked(tmp_path, "0" * 16, {}, begins))
        for samples in seen:
            tracking.scalars({"loss": float(samples)}, samples)
        tracking.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [12, 24]


def test_wandb_is_called_as_it_wants_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own step never falls, so that ours is a number of its own."""
    calls: list[Any] = []
    run = SimpleNamespace(
        define_metric=lambda *a, **k: calls.append(("define", a, k)),
        log=calls.append,
        finish=lambda: calls.append("finish"),
    )
    fake: Any = SimpleNamespace(
        init=lambda **given: calls.append(given) or run, Settings=lambda **given: given, Image=lambda file: f"image {Path(file).name}"
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    installed(monkeypatch, "wandb")
    trained(settings(tmp_path, {"name": "wandb", "project": "mine"}))
    given, defined, *told, last = calls
    assert (given["project"], given["mode"], given["resume"], given["dir"]) == ("mine", "offline", "allow", str(tmp_path))
    assert len(given["id"]) == 16 and given["config"]["training"]["samples"] == 36
    assert defined == ("define", ("*",), {"step_metric": "samples"}) and last == "finish"
    assert [entry["samples"] for entry in told] == [12, 24, 24, 36] and told[2]["generated"] == "image 000000000024.png"


def test_wandb_writes_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    trained(settings(tmp_path, "wandb"), stop_after=1)
    trained(settings(tmp_path, "wandb"))
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 2


def test_mlflow_keeps_one_run_for_all_attempts(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    trained(settings(tmp_path, "mlflow"), stop_after=1)
    trained(settings(tmp_path, "mlflow"))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("gentrain")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss/model")
    assert sorted(metric.step for metric in history) == [12, 24, 36] and run.info.status == "FINISHED"
    losses = [line["loss/model"] for line in records(tmp_path)]
    assert [metric.value for metric in sorted(history, key=lambda metric: metric.step)] == pytest.approx(losses)
    assert {each.path for each in client.list_artifacts(run.info.run_id)} == {"config.yaml", "samples"}


def test_mlflow_is_called_as_it_wants_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stood in for: its experiments and runs are kept from one attempt to the next."""
    experiments: dict[str, str] = {}
    runs: dict[str, dict[str, Any]] = {}

    class Client:
        def __init__(self, uri: str):
            self.uri = uri

        def get_experiment_by_name(self, name: str) -> Any:
            return SimpleNamespace(experiment_id="7") if name in experiments else None

        def create_experiment(self, name: str, artifacts: str | None) -> str:
            experiments[name] = f"{self.uri} {artifacts}"
            return "7"

        def search_runs(self, ids: list[str], wanted: str, max_results: int) -> list[Any]:
            assert ids == ["7"] and max_results == 1
            return [SimpleNamespace(info=SimpleNamespace(run_id=key)) for key in runs if wanted == f"tags.`gentrain.identity` = '{key}'"]

        def create_run(self, experiment: str, tags: dict[str, str], run_name: str) -> Any:
            (key,) = tags.values()
            runs[key] = {"name": run_name, "told": [], "status": []}
            return SimpleNamespace(info=SimpleNamespace(run_id=key))

        def set_terminated(self, key: str, status: str = "FINISHED") -> None:
            runs[key]["status"].append(status)

        def log_text(self, key: str, text: str, file: str) -> None:
            runs[key]["told"].append((file, "name: flow_matching" in text))

        def log_batch(self, key: str, metrics: list[Any]) -> None:
            runs[key]["told"].append({name: (value, step) for name, value, _, step in metrics})

        def log_artifact(self, key: str, file: str, folder: str) -> None:
            runs[key]["told"].append((folder, Path(file).name))

    entities: Any = SimpleNamespace(Metric=lambda *given: given)
    fake: Any = SimpleNamespace(MlflowClient=Client, entities=entities)
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    installed(monkeypatch, "mlflow")
    trained(settings(tmp_path, "mlflow"), stop_after=1)
    trained(settings(tmp_path, "mlflow"))
    assert experiments == {"gentrain": f"sqlite:///{tmp_path}/mlflow/mlflow.db {(tmp_path / 'mlflow/artifacts').as_uri()}"}
    ((_, run),) = runs.items()
    assert run["name"] == tmp_path.name and run["status"][0] == "RUNNING" and run["status"][-1] == "FINISHED"
    assert [each for each in run["told"] if isinstance(each, tuple)] == [
        ("config.yaml", True), ("config.yaml", True), ("samples", "000000000024.png"),
    ]  # fmt: skip
    told = [each for each in run["told"] if isinstance(each, dict)]
    for line, numbers in zip(records(tmp_path), told, strict=True):
        assert numbers["loss/model"] == (line["loss/model"], line["samples"])
    trained(settings(tmp_path / "far", {"name": "mlflow", "uri": "http://tracking:5000", "experiment": "far"}))
    assert experiments["far"] == "http://tracking:5000 None" and len(runs) == 2


def test_names_of_metrics_are_in_letters_that_mlflow_allows() -> None:
    from gentrain.training.trackers.mlflow import _name

    assert _name("loss/model, 0.1 to 1 [a]") == "loss/model_ 0.1 to 1 _a_"
