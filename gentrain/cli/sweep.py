"""The command `sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from gentrain import cli

if TYPE_CHECKING:
    from gentrain.cluster.sweeps import Journal, LoadedSweep


@cli.app.command()
def sweep(
    config: Path,
    overrides: cli.Overrides = None,
    trial: Annotated[int | None, typer.Option(help="Only this one, in a job array of all: 0, 1, ...; compared with those so far.")] = None,
) -> int:
    """Trains a run many times with other values of the keys that its section `sweep:` names; poor trials are stopped early.

    Example: gentrain sweep configs/sweeps/rings.yaml sweep.concurrent=2
    """
    from gentrain.cluster.session import ClusterLost, session
    from gentrain.cluster.supervise import supervise
    from gentrain.cluster.sweeps import load_sweep
    from gentrain.cluster.tune import run_sweep
    from gentrain.report import write_report

    loaded = load_sweep(config, overrides or ())
    if trial is not None:
        return _one(loaded, trial, config, overrides)

    def body() -> int:
        with session():
            journal = run_sweep(loaded)
        _print(journal, loaded.directory)
        cli._say(f"report: {write_report(loaded.directory)}")
        left = {journal.of(trial.name)["status"] for trial in journal.unfinished()}
        if "waiting" in left:
            return cli._stopped("sweep", config, overrides)
        if left:
            cli._say("some trials failed: run the same again to go on with them from their newest checkpoints")
        return cli.FAILED if left else 0

    return supervise(lambda: cli._guarded(lambda **_: body(), (ClusterLost,)), loaded.trials[0].run.cluster, loaded.directory)


def _one(loaded: LoadedSweep, number: int, config: Path, overrides: list[str] | None) -> int:
    from gentrain.cluster.session import session
    from gentrain.cluster.tune import run_trial
    from gentrain.config import ConfigError
    from gentrain.report import write_report
    from gentrain.training.lock import hold

    count = len(loaded.trials)
    if not 0 <= number < count:
        raise ConfigError(f"there is no trial {number}: {loaded.directory} has {count}, 0 to {count - 1}; correct --trial")
    trial = loaded.trials[number]

    def body() -> int:
        with session():
            status = run_trial(loaded, number)
        with hold(loaded.directory, wait_s=60):  # other tasks write it, too
            cli._say(f"trial {trial.name}: {status}\nreport: {write_report(loaded.directory)}")
        if status == "waiting":
            return cli._stopped("sweep", config, [*(overrides or ()), f"--trial={number}"])
        return cli.FAILED if status == "failed" else 0

    return cli._supervised(body, [trial.run.cluster] if trial.run.cluster.place == "ray" else [], trial.run.directory)


def _print(journal: Journal, directory: Path) -> None:
    from gentrain.cluster.sweeps import TRIALS, shown
    from gentrain.report import short

    settings = journal.record["settings"]
    title = f"{settings['metric']}, {settings['best_is']} is best"
    table = Table("trial", "parameters", "value", "samples", "status", title=cli._escape(title), title_justify="left")
    names = journal.ranking()
    for name in names:
        trial = journal.of(name)
        samples, value = trial["rungs"][-1] if trial["rungs"] else (None, None)
        table.add_row(
            name, cli._escape(shown(trial["parameters"])), "" if value is None else short(value), "" if samples is None else f"{samples:,}",
            trial["status"],
        )  # fmt: skip
    cli.console.print(table)
    if journal.of(names[0])["rungs"]:
        cli._say(f"best so far: {directory / TRIALS / names[0]}")
