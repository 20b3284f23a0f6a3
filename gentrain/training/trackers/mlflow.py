"""MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gentrain.config import option, register, to_yaml
from gentrain.training.trackers.base import Tracked, Tracker, Tracking

_TAG = "gentrain.identity"


class _Tracking(Tracking):
    def __init__(self, tracker: MLflow, run: Tracked):
        from mlflow import MlflowClient

        directory = run.directory.absolute() / "mlflow"
        directory.mkdir(exist_ok=True)
        self._client = MlflowClient(tracker.uri or f"sqlite:///{directory}/mlflow.db")
        known = self._client.get_experiment_by_name(tracker.experiment)
        artifacts = None if tracker.uri else (directory / "artifacts").as_uri()
        experiment = self._client.create_experiment(tracker.experiment, artifacts) if known is None else known.experiment_id
        before = self._client.search_runs([experiment], f"tags.`{_TAG}` = '{run.identity}'", max_results=1)
        found = before[0] if before else self._client.create_run(experiment, tags={_TAG: run.identity}, run_name=run.directory.name)
        self._id = found.info.run_id
        self._client.set_terminated(self._id, "RUNNING")
        self._client.log_text(self._id, to_yaml(run.config), "config.yaml")

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        import time

        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._id, [Metric(_name(key), value, now, samples) for key, value in values.items()])

    def image(self, file: Path, samples: int) -> None:
        self._client.log_artifact(self._id, str(file), "samples")

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _name(key: str) -> str:
    """A metric's name in the letters that MLflow allows."""
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in key)


@register("mlflow")
@dataclass
class MLflow(Tracker):
    """MLflow (`pip install 'gentrain[mlflow]'`): one run for all attempts; without `uri` it lies in `mlflow/` of the run's directory."""

    package = ("mlflow", "mlflow")

    uri: str | None = option(None, "tracking server or database; null = a file in the run's directory")
    experiment: str = option("gentrain", "the experiment")

    def start(self, run: Tracked) -> Tracking:
        return _Tracking(self, run)
