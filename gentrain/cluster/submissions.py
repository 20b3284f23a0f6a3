"""Submissions: from a configuration to a place, and back to what was sent there by the name of the run."""

from __future__ import annotations

import difflib
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from gentrain.cluster.local import Local
from gentrain.cluster.places import Handle, Place, PlaceError, State, Submission
from gentrain.config import ConfigError, Document, build, option, to_dict
from gentrain.document import reads_environment, variables
from gentrain.training.checkpoint import CheckpointError, refuse_foreign
from gentrain.training.cluster import Cluster
from gentrain.training.lock import hold

log = logging.getLogger(__name__)

RECORD = "submission.json"
RUNS = Path("runs")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass
class _Section:
    submit: Place = option(Local)


class Record(TypedDict):
    """What submission.json holds: no secret's value."""

    place: dict[str, Any]
    submission: Submission
    handle: Handle
    submitted: str


_RECORD = TypeAdapter(Record)


def place_of(document: Document) -> Place:
    """The place that a configuration names in `cluster.submit`; `local` if it names none. Raises ConfigError."""
    cluster = document.values.get("cluster")
    if not isinstance(cluster, dict) or "submit" not in cluster:
        return Local()
    section = document.section("cluster")
    submit = cluster["submit"]
    for key, value in (submit if isinstance(submit, dict) else {"": submit}).items():
        if reads_environment(value):
            remedy = "name the variable in `secrets`, and let what runs there read it"
            raise section.error(f"submit.{key}".rstrip("."), f"what it holds is written into files and arguments; {remedy}")
    place = build(_Section, Document({"submit": submit}, section.file, section.origins, section.place)).submit
    for key, names in (("environment", place.environment), ("secrets", place.secrets)):
        for name in names:
            if not _VARIABLE.fullmatch(name):
                raise section.error(f"submit.{key}", f"{name!r} is no name of a variable: letters, digits and _ only")
    if any(not value.isprintable() for value in place.environment.values()):
        raise section.error("submit.environment", "a value holds a character that cannot be printed; take it out")
    if place.storage is not None and not os.path.isabs(place.storage):
        raise section.error("submit.storage", f"expected an absolute directory, got {place.storage!r}")
    return place


def output_at(place: Place, output: str) -> str:
    """A run's directory as the place names it, absolute."""
    return os.path.normpath(os.path.join(place.storage or os.getcwd(), output))


def submission_of(
    place: Place,
    command: str,
    directory: str,
    config: Mapping[str, Any],
    clusters: Sequence[Cluster],
    trials: int = 0,
    tuned: bool = False,
) -> Submission:
    """What is sent to the place.

    Args:
        command: `train`, `run` or `sweep`.
        directory: of the run as this machine names it.
        config: the resolved configuration, in plain values; its `output` is the directory as the place names it.
        clusters: of the runs that it trains.
        trials: of a sweep, how many. tuned: whether it, or a stage of a recipe, trains under Ray Tune.

    Raises ConfigError when the directory's name is none for a job.
    """
    name = Path(directory).name
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name for a job: at most 63 letters, digits, `.`, `_` and `-`; change it", key="output")
    sections = {"cluster": {key: value for key, value in config["cluster"].items() if key != "submit"}}
    values = {**config, **sections} if sections["cluster"] else {key: value for key, value in config.items() if key != "cluster"}
    secrets = tuple(sorted({*variables(values), *place.secrets}))
    return Submission(
        name=name,
        config=yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
        command=("gentrain", command, "config.yaml"),
        directory=Path(os.path.abspath(directory)),
        output=config["output"],
        environment=place.environment,
        secrets=secrets,
        trials=trials,
        under_ray=tuned or any(cluster.place == "ray" for cluster in clusters),
        workers=(max(cluster.fewest for cluster in clusters), max(cluster.most for cluster in clusters)) if clusters else (1, 1),
        cpus_per_worker=max((cluster.cpus_per_worker for cluster in clusters), default=1),
        gpus_per_worker=max((cluster.gpus_per_worker for cluster in clusters), default=0.0),
        grace_s=max((cluster.grace_s for cluster in clusters if cluster.place == "ray"), default=0.0),
        interface=next((cluster.network.interface for cluster in clusters if cluster.network.interface is not None), None),
    )


def send(place: Place, submission: Submission) -> Handle:
    """Submits it and writes down, in the run's directory, what finds it again.

    Raises ConfigError when the run has been submitted before and is not over. PlaceError.
    """
    files = place.render(submission)
    with hold(submission.directory, "submission"):
        _refuse_running(submission.directory)
        submission.files.mkdir(exist_ok=True)
        for name, text in files.items():
            _write(submission.files / name, text.encode())
        path = submission.directory / RECORD
        before = path.read_bytes() if path.exists() else None
        handle = place.expected(submission)
        _keep(place, submission, handle)  # before it is sent: a job whose sender is killed is found all the same
        try:
            handle = place.submit(submission, handle)
        except Exception as error:
            if not (isinstance(error, PlaceError) and _has_begun(place, handle)):
                path.unlink() if before is None else _write(path, before)
                raise
            log.warning("%s; the place has accepted it all the same", error)  # its answer was lost on the way
        _keep(place, submission, handle)
    return handle


def _keep(place: Place, submission: Submission, handle: Handle) -> None:
    record = Record(place=to_dict(place), submission=submission, handle=handle, submitted=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    _write(submission.directory / RECORD, _RECORD.dump_json(record, indent=1))


def _has_begun(place: Place, handle: Handle) -> bool:
    try:
        return not place.status(handle).is_over
    except PlaceError:
        return False


def find(run: str) -> tuple[Place, Record]:
    """What was submitted under a name, or from a run's directory. Raises ConfigError."""
    for directory in (Path(run), RUNS / run):
        if (directory / RECORD).exists():
            return read(directory)
    known = submitted_here()
    near = difflib.get_close_matches(run, known, 1, cutoff=0.5)
    remedy = f"did you mean {near[0]}?" if near else f"submitted from here: {', '.join(known) or 'nothing'}; or name the run's directory"
    raise ConfigError(f"no run {run!r} has been submitted; {remedy}")


def called(submission: Submission) -> str:
    """What `find` finds it by from here: its name, or its directory where that does not lie in runs/."""
    return submission.name if submission.directory.parent == RUNS.absolute() else str(submission.directory)


def submitted_here() -> list[str]:
    """The names of the runs in runs/ that have been submitted."""
    return sorted(path.parent.name for path in RUNS.glob(f"*/{RECORD}"))


def read(directory: Path) -> tuple[Place, Record]:
    """What was submitted from a run's directory. Raises ConfigError when the record is damaged, or another user could have written it."""
    path = directory / RECORD
    try:
        refuse_foreign(path)
        record = _RECORD.validate_json(path.read_bytes())
        place = build(_Section, Document({"submit": record["place"]}, str(path))).submit
        record["handle"] = TypeAdapter(place.handle).validate_python(record["handle"])
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    except (OSError, ValidationError) as error:
        # It may stand for a job that still runs: nothing but a person can tell, and nothing is submitted over it.
        text = "damaged; make sure that no job of this run is left where it was sent, remove the file, then submit the run again"
        raise ConfigError(text, source=str(path)) from error
    record["submission"] = replace(record["submission"], directory=directory.absolute())  # wherever it has been moved to since
    return place, record


def state_before(place: Place, record: Record) -> State:
    """Of what is about to be submitted again. Raises PlaceError."""
    try:
        return place.status(record["handle"])
    except PlaceError as error:
        path = record["submission"].directory / RECORD
        raise PlaceError(f"{error}; if what was submitted before is gone for good, remove {path}") from error


def _refuse_running(directory: Path) -> None:
    if not (directory / RECORD).exists():
        return
    place, record = read(directory)
    state = state_before(place, record)
    if not state.is_over:
        name = called(record["submission"])
        raise ConfigError(f"{name} is {state.value} already; follow it with: gentrain logs {name} -f, or stop it first", key="output")


def _write(path: Path, data: bytes) -> None:
    """For this user's eyes only, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    temporary.replace(path)
