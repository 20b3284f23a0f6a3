"""The commands of what runs without this terminal: submit, status, logs, stop, resume."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from gentrain import cli

if TYPE_CHECKING:
    from gentrain.cluster.places import Place, Submission
    from gentrain.document import Document
    from gentrain.training.run import RunConfig

log = logging.getLogger(__name__)

Submitted = Annotated[str | None, typer.Argument(help="Name or directory of a submitted run; left out: all that are in runs/")]


@cli.app.command()
def submit(
    config: Path, overrides: cli.Overrides = None, dry_run: Annotated[bool, typer.Option(help="Print what would be sent.")] = False
) -> int:
    """Sends a run, a recipe or a sweep to the place that `cluster.submit` names, where it goes on without this terminal.

    Example: gentrain submit configs/quickstart.yaml cluster.submit=ray cluster.submit.address=http://127.0.0.1:8265
    """
    import gentrain.recipes.base  # noqa: F401 -- which resolves ${output:STAGE}
    from gentrain.config import load

    document = load(config, overrides or (), {"output": f"runs/{config.stem}"})
    with _told_where(document):
        return _submit(document, config, overrides, dry_run)


@contextmanager
def _told_where(document: Document) -> Iterator[None]:
    """A ConfigError that names a key names the file that sets it, too."""
    from gentrain.config import ConfigError

    try:
        yield
    except ConfigError as error:
        if error.source is not None or not error.key:
            raise
        raise document.error(error.key, error.message) from error


def _submit(document: Document, config: Path, overrides: list[str] | None, dry_run: bool) -> int:
    from gentrain.catalogue import plan_tables
    from gentrain.cluster.places import Allocation
    from gentrain.cluster.submissions import called, output_at, place_of, send, submission_of
    from gentrain.cluster.sweeps import load_sweep
    from gentrain.document import reads_environment
    from gentrain.recipes.base import RecipeConfig
    from gentrain.training.beginning import refuse_wrong_start
    from gentrain.training.object_storage import is_local
    from gentrain.training.remedies import refuse_url

    place, directory = place_of(document), document.values["output"]
    if not isinstance(directory, str) or reads_environment(directory):
        raise document.error("output", "what is submitted is found again by its directory; write that out")
    refuse_url(directory, "output")
    there = [*(overrides or ()), f"output={json.dumps(output_at(place, directory))}"]
    loaded, runs = cli._loaded(config, there)
    tables = plan_tables(runs, limit=None)
    swept = load_sweep(config, overrides or ()) if "sweep" in document.values else None
    if swept is not None and swept.dependent:
        text = "an interpolation takes it from a key that varies, which cannot be sent; vary it by name, too"
        raise document.error(swept.dependent[0], text)
    command = next((command for key, command in (("sweep", "sweep"), ("stages", "run")) if key in document.values), "train")

    def submission_with(runs: dict[str, RunConfig]) -> Submission:
        clusters, trials = [run.cluster for run in runs.values()], len(swept.trials) if swept is not None else 0
        tuned = swept is not None or (isinstance(loaded, RecipeConfig) and any(stage.under_ray for stage in loaded.stages.values()))
        return submission_of(place, command, directory, cli._plain(loaded), clusters, trials, tuned)

    submission = _first_of_array(place, config, there, submission_with) or submission_with(runs)
    if dry_run:
        for name, text in place.render(submission).items():
            cli._say(f"# --- {name}\n{text.rstrip()}\n")
        return 0
    cli.console.print(*tables, sep="\n")
    if isinstance(place, Allocation):
        cli._say(f"{place.registered_name}: {place.described()}")
    if command == "train" and not place.variants():
        for run in runs.values():
            if run.training.checkpoints is None or is_local(run.training.checkpoints):  # of a bucket, the job itself looks
                refuse_wrong_start(run, ())
    send(place, submission)
    cli._say(f"submitted: {submission.name} to {place.registered_name}; its directory there is {submission.output}")
    if submission.secrets:
        cli._say(f"the job reads these variables, which the place has to give: {', '.join(submission.secrets)}")
    when = "at its end" if command != "train" else f"with: gentrain report {submission.directory}"
    cli._say(f"logs: gentrain logs {called(submission)} -f\nreport: {submission.output}/report.html, {when}")
    return 0


def _first_of_array(
    place: Place, config: Path, overrides: list[str], submission_with: Callable[[dict[str, RunConfig]], Submission]
) -> Submission | None:
    """Of the runs that the configuration becomes there, each of which has been checked; None: it stays one. Raises ConfigError."""
    from gentrain.config import ConfigError

    first = None
    for number, variant in enumerate(place.variants()):
        try:
            _, runs = cli._loaded(config, [*overrides, *variant])
            place.render(submission := submission_with(runs))  # which refuses what does not fit
        except ConfigError as error:
            raise ConfigError(f"entry {number}: {error}", key="cluster.submit.array") from error
        first = first or submission
    return first


@cli.app.command()
def status(run: Submitted = None) -> int:
    """What has become of a submitted run; without RUN, of all that were submitted from here.

    Example: gentrain status quickstart
    """
    from gentrain.cluster.attempts import last_failure
    from gentrain.cluster.places import PlaceError
    from gentrain.cluster.progress import last_record
    from gentrain.cluster.submissions import find, submitted_here
    from gentrain.config import ConfigError
    from gentrain.training.run import METRICS

    table = Table("run", "place", "state", "samples", "submitted", "directory")
    for name in [run] if run is not None else submitted_here():
        try:
            place, record = find(name)
        except ConfigError as error:
            if run is not None:
                raise
            cli._say(f"{error}")
            continue
        directory = record["submission"].directory
        samples = (last_record(directory / METRICS) or {}).get("samples", "")
        try:
            state = place.status(record["handle"]).value
        except PlaceError as error:  # of one of many: the others are told all the same
            state = "unknown"
            cli._say(f"{record['submission'].name}: {error}")
        table.add_row(
            record["submission"].name, place.registered_name, state, f"{samples}", record["submitted"], cli._escape(str(directory))
        )
        if run is not None and last_failure(directory):
            cli._say(f"last failure: {last_failure(directory)}")
    cli.console.print(table)
    return 0


@cli.app.command()
def logs(run: str, follow: Annotated[bool, typer.Option("--follow", "-f", help="On to the end of the job.")] = False) -> int:
    """What a submitted run has printed. With -f, what it prints until it ends; Ctrl-C ends the following, not the run.

    Example: gentrain logs quickstart -f
    """
    from gentrain.cluster.submissions import find

    place, record = find(run)
    empty = True
    for line in place.logs(record["handle"], follow):
        cli._say(line)
        empty = False
    if empty:
        log.warning("%s has printed nothing; it is %s", run, place.status(record["handle"]).value)
    return 0


@cli.app.command()
def stop(run: str) -> int:
    """Asks a submitted run for a checkpoint and its end; `resume` goes on from there.

    Example: gentrain stop quickstart
    """
    from gentrain.cluster.submissions import find

    place, record = find(run)
    state = place.status(record["handle"])
    if state.is_over:
        cli._say(f"{run} runs no more: {state.value}")
        return 0
    place.stop(record["handle"])
    cli._say(f"asked to stop: {run}. See: gentrain status {run}")
    return 0


@cli.app.command()
def resume(run: str) -> int:
    """Submits a run again as it was submitted before: it goes on from its newest checkpoint, a recipe from its unfinished stage.

    Example: gentrain resume quickstart
    """
    from gentrain.cluster.places import State
    from gentrain.cluster.submissions import find, send, state_before
    from gentrain.config import ConfigError

    place, record = find(run)
    if state_before(place, record) is State.SUCCEEDED:
        raise ConfigError(f"{run} has succeeded: nothing is left to do; to train it for longer, submit it again with more training.samples")
    submission = record["submission"]
    if place.storage is None and not (os.path.exists(submission.output) and os.path.samefile(submission.output, submission.directory)):
        remedy = f"move it back, or submit it with output={submission.directory}"
        raise ConfigError(f"{run} was submitted as {submission.output} and would begin anew there; {remedy}", key="output")
    send(place, submission)
    cli._say(f"submitted again: {submission.name} to {place.registered_name}\nlogs: gentrain logs {run} -f")
    return 0
