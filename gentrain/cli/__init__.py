"""The `gentrain` command. Thin: every command loads what it needs when it runs, so that --help is quick."""

# ruff: noqa: E402

from __future__ import annotations

import sys

from gentrain.cluster.stopping import StopRequested, goes_on, receive, settle

if goes_on() and "multiprocessing" not in sys.modules:  # with it, this may be a child that was told the command line of its parent
    receive()  # before what follows, which takes a moment to be imported

import logging
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from gentrain.cli.console import Console, warnings_on

if TYPE_CHECKING:
    from gentrain.training.cluster import Cluster
    from gentrain.training.run import RunConfig


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # typer would end with status 130 and no word
            raise typer.Abort from None


app: typer.Typer = typer.Typer(
    cls=_Commands, name="gentrain", no_args_is_help=True, add_completion=False, rich_markup_mode="rich",
    help="Trains, samples, evaluates and exports diffusion and flow models.",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 failed, 2 the command or a configuration must be mended, 75 stopped: run the same again to go on.",
)  # fmt: skip


console: Console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of the ranks of torchrun, one speaks

GENERATED, EVALUATION = "generated", "evaluation"  # of a run, as `sample` and `evaluate` leave them
FAILED, MEND, RESUME = 1, 2, 75  # 75 = EX_TEMPFAIL, which schedulers can be told to requeue on

_KEYS = "[KEY=VALUE]..."
Overrides = Annotated[list[str] | None, typer.Argument(metavar=_KEYS, help="Overrides of what the file says, e.g. training.batch_size=128")]
DrawOverrides = Annotated[
    list[str] | None, typer.Argument(metavar=_KEYS, help="Keys of the stage `generate`, e.g. count=64 sampler.guidance=3")
]
JudgeOverrides = Annotated[list[str] | None, typer.Argument(metavar=_KEYS, help="Keys of the stage `evaluate`, e.g. judge=runs/judge")]
ExportOverrides = Annotated[list[str] | None, typer.Argument(metavar=_KEYS, help="Keys of the stage `export`, e.g. sampler.steps=50")]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        _say(f"gentrain {version('gentrain')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.", callback=_print_version, is_eager=True)] = False,
) -> None:
    from gentrain.cluster.versions import refuse_others

    refuse_others()


def main() -> None:
    """Entry point: turns expected errors into one clear message and an exit status."""
    if goes_on():
        receive()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[warnings_on(Console(stderr=True))])
    logging.getLogger("gentrain").setLevel(logging.INFO)
    try:
        status = _guarded(app)
    except KeyboardInterrupt:  # while it is still being imported
        status = 130
    settle(status)
    sys.exit(status)


def _guarded(command: Callable[..., Any], passed_on: tuple[type[Exception], ...] = ()) -> int:
    from safetensors import SafetensorError

    from gentrain.config import ConfigError
    from gentrain.training.remedies import remedy_of

    try:
        status = command(standalone_mode=False)
        return status if isinstance(status, int) else 0
    except passed_on:
        raise
    except StopRequested:
        _say(f"stopped where nothing had to be published; what was before stays. Go on with: {shlex.join(['gentrain', *sys.argv[1:]])}")
        return RESUME
    except SystemExit as error:
        return _complain(f"sys.exit({error.code!r}) was called on the way, by a plugin or a library: the command is not done", FAILED)
    except (KeyboardInterrupt, typer.Abort):
        return _complain(
            "interrupted; what was finished before is kept, a run goes on from its last checkpoint: run the same command again", 130
        )
    except ConfigError as error:
        return _complain(str(error), MEND)
    except typer.TyperException as error:
        message = error.format_message()  # none when a bare `gentrain` has just printed the help
        return _complain(f"{message} See gentrain --help.", error.exit_code) if message else error.exit_code
    except (OSError, ValueError, RuntimeError, FloatingPointError, SafetensorError) as error:  # the last: of a full disk, too
        logging.getLogger("gentrain").debug("traceback", exc_info=True)
        return _complain("; ".join(filter(None, (str(error), remedy_of(error)))), FAILED)


def _complain(message: str, status: int) -> int:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error[/] {_escape(message)}", highlight=False)
    return status


def _say(text: str) -> None:
    """Prints text as it is: paths and overrides may hold brackets, and are copied from here."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _stopped(command: str, config: Path, overrides: list[str] | None) -> int:
    _say(f"stopped; a checkpoint is published. Go on with: {shlex.join(['gentrain', command, str(config), *(overrides or ())])}")
    return RESUME


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@app.command()
def run(recipe: Path, overrides: Overrides = None) -> int:
    """Runs a recipe's stages, skipping what is finished and resuming what is not.

    Example: gentrain run configs/quickstart.yaml stages.generator.run.training.samples=20000
    """
    from gentrain.cluster.session import session
    from gentrain.recipes.base import Stopped, load_recipe, run_recipe
    from gentrain.recipes.evaluate import METRICS
    from gentrain.report import write_report
    from gentrain.training.lock import hold

    loaded = load_recipe(recipe, overrides or ())

    def body() -> int:
        with session(), hold(loaded.directory):
            try:
                run_recipe(loaded, lambda line: console.print(f"[bold cyan]·[/] {_escape(line)}", highlight=False))
            except Stopped:
                return _stopped("run", recipe, overrides)
        for directory in (loaded.directory / name for name in loaded.stages):
            if (directory / METRICS).is_file():
                _print_metrics(directory)
        _say(f"report: {write_report(loaded.directory)}")
        return 0

    return _supervised(body, [each.trained.cluster for each in loaded.stages.values() if each.trained and each.under_ray], loaded.directory)


@app.command()
def train(config: Path, overrides: Overrides = None) -> int:
    """Trains one run, from its newest checkpoint if it has one. Ctrl-C publishes a checkpoint and stops.

    Example: gentrain train configs/mnist5k/flow_matching.yaml cluster.place=ray cluster.workers=2
    """
    from gentrain.cluster.launch import launch
    from gentrain.cluster.session import session
    from gentrain.config import ConfigError
    from gentrain.recipes.base import is_recipe
    from gentrain.training.loop import Outcome
    from gentrain.training.run import load_run

    if is_recipe(config, overrides or ()):
        raise ConfigError(f"this is a recipe, not a run; run it with: gentrain run {config}", source=str(config), key="stages")
    loaded = load_run(config, overrides or ())

    def body() -> int:
        with session():
            outcome = launch(loaded)
        if outcome is Outcome.STOPPED:
            return _stopped("train", config, overrides)
        _say(f"trained: {loaded.directory}")
        return 0

    return _supervised(body, [loaded.cluster] if loaded.cluster.place == "ray" else [], loaded.directory)


@app.command()
def sample(
    run: Path, overrides: DrawOverrides = None, out: Annotated[Path | None, typer.Option(help="Default: RUN/generated")] = None
) -> int:
    """Draws samples from a run's newest checkpoint, in place of those that were there.

    Example: gentrain sample runs/quickstart/generator sampler.guidance=3
    """
    from gentrain.recipes.generate import Generate
    from gentrain.training.run import open_run

    directory = out or run / GENERATED
    _execute(Generate, {"run": str(run), "sampler": _plain(open_run(run).sampler)}, overrides, directory)
    if out is None and (run / EVALUATION).exists():
        shutil.rmtree(run / EVALUATION)
        _say(f"removed, since it was of the former samples: {run / EVALUATION}")
    _say(f"samples: {directory}")
    return 0


@app.command()
def evaluate(run: Path, overrides: JudgeOverrides = None) -> int:
    """Compares a run's samples (see `sample`) with held-out data. A judge is a trained run of the method `classifier`.

    Example: gentrain evaluate runs/quickstart/generator judge=runs/quickstart/judge
    """
    from gentrain.recipes.evaluate import Evaluate, own_samples
    from gentrain.training.run import open_run

    samples = {GENERATED: own_samples(run, run / GENERATED)}
    _execute(Evaluate, {"samples": samples, "data": _plain(open_run(run).data)}, overrides, run / EVALUATION)
    _print_metrics(run / EVALUATION)
    return 0


@app.command()
def export(
    run: Path,
    out: Path,
    overrides: ExportOverrides = None,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Repository on the hub that gets it; token: HF_TOKEN")] = None,
    revision: Annotated[str | None, typer.Option(help="With --push: branch that gets the commit; left out: main")] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: for a repository that is made now")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --push: say what would be sent, and send nothing")] = False,
) -> int:
    """Writes a run's generator as a diffusers pipeline directory with a model card, which tells what `evaluate` measured.

    Example: gentrain export runs/quickstart/generator digits-pipeline sampler.guidance=3
    """
    from gentrain.config import ConfigError
    from gentrain.recipes.evaluate import measured_weights, refuse_former_weights
    from gentrain.recipes.export import Export
    from gentrain.training.run import open_run

    scores = run / EVALUATION
    if scores.is_dir():
        refuse_former_weights(run, measured_weights(scores).get(GENERATED), f"{scores} holds numbers")
    values = {"run": str(run), "sampler": _plain(open_run(run).sampler), "scores": str(scores) if scores.is_dir() else None}
    if push is None and (revision is not None or private or dry_run):
        raise ConfigError("--revision, --private and --dry-run are about what is sent to the hub; say where with --push OWNER/NAME")
    if push is not None:
        values["push"] = {"repository": push, "revision": revision, "private": private, "dry_run": dry_run}
    stage = _stage(Export, values, overrides)
    try:
        _say(f"exported: {stage.write(out)}")
    except FileExistsError as error:
        raise ConfigError(str(error)) from error
    for line in stage.publish(out):
        _say(line)
    return 0


@app.command()
def report(run: Path) -> int:
    """Writes report.html for a run's or a recipe's directory and prints its path.

    Example: gentrain report runs/quickstart
    """
    from gentrain.config import ConfigError
    from gentrain.report import write_report

    if not run.is_dir():
        raise ConfigError("no such run; name the directory of a run or a recipe", source=str(run))
    _say(str(write_report(run)))
    return 0


@app.command()
def plan(
    config: Path,
    overrides: Overrides = None,
    memory: Annotated[float | None, typer.Option(min=1e-6, max=1e6, help="GiB of each process; left out: those of the GPU here")] = None,
) -> int:
    """Checks a run or a recipe without starting anything: resolved configuration, parameters per role, placement, memory.

    Example: gentrain plan configs/quickstart.yaml --memory 24
    """
    from gentrain.catalogue import plan_tables, stages_table
    from gentrain.cluster.submissions import place_of
    from gentrain.config import load, to_yaml
    from gentrain.recipes.base import RecipeConfig

    loaded, runs = _loaded(config, overrides)
    place_of(load(config, overrides or (), {"output": f"runs/{config.stem}"}))
    limit = _device_memory() if memory is None else int(memory * 2**30)
    # before anything is printed: building the networks shows whether they fit the data
    found = plan_tables(runs, limit, alone=not isinstance(loaded, RecipeConfig))
    _say(to_yaml(loaded))
    held = [stages_table(loaded.stages)] if isinstance(loaded, RecipeConfig) else []
    console.print(*held, *found, sep="\n", highlight=False)
    return 0


def _device_memory() -> int | None:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Of a method, path, sampler, ...; left out: list them")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar=_KEYS, help="plugins=[FILE.py], whose own are shown too")] = None,
) -> int:
    """Lists what exists; with NAME, every field of it: type, default, unit, source.

    Example: gentrain methods flow_matching
    """
    from gentrain.catalogue import add_plugins, kinds, show

    if name is not None and "=" in name:
        overrides, name = [name, *(overrides or ())], None
    add_plugins(overrides or ())
    if name is None:
        for kind, entries in kinds().items():
            table = Table("name", "what it is", title=f"{kind}s", title_justify="left")
            for entry, component in entries.items():
                table.add_row(entry, _escape((component.__doc__ or "").strip().splitlines()[0]))
            console.print(table)
    else:
        show(name, console)
    return 0


@app.command()
def doctor() -> int:
    """Checks versions, accelerator, compiler, ports, Ray and DeepSpeed; says what is wrong and how to mend it.

    Example: gentrain doctor
    """
    from gentrain.doctor import checks

    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table("check", "", "found", "what to do")
    found = checks()
    for check in found:
        table.add_row(check.name, f"[{colours[check.status]}]{check.status}[/]", _escape(check.detail), _escape(check.remedy))
    console.print(table)
    return FAILED if any(check.status == "fail" for check in found) else 0


def _supervised(body: Callable[[], int], clusters: list[Cluster], directory: Path) -> int:
    """The exit status of `body`; where Ray trains on these, in a process of its own, started again when the head takes it along."""
    from gentrain.cluster.session import ClusterLost
    from gentrain.cluster.supervise import supervise

    if not clusters:
        return body()
    most_patient = max(clusters, key=lambda cluster: cluster.max_attempts)
    return supervise(lambda: _guarded(lambda **_: body(), (ClusterLost,)), most_patient, directory)


def _loaded(config: Path, overrides: list[str] | None) -> tuple[Any, dict[str, RunConfig]]:
    """A run, a recipe or (in plain values) a sweep, and the runs in it by their names: of a sweep, the first trial. Raises ConfigError."""
    from gentrain.cluster.sweeps import is_sweep, load_sweep
    from gentrain.recipes.base import is_recipe, load_recipe
    from gentrain.training.run import load_run

    if is_sweep(config, overrides or ()):
        tried = load_sweep(config, overrides or ())
        return tried.config, {f"{config.stem}, first of {len(tried.trials)} trials": tried.trials[0].run}
    if not is_recipe(config, overrides or ()):
        run = load_run(config, overrides or ())
        return run, {config.stem: run}
    recipe = load_recipe(config, overrides or ())
    return recipe, {name: stage.trained for name, stage in recipe.stages.items() if stage.trained is not None}


def _stage(schema: type[Any], values: dict[str, Any], overrides: list[str] | None) -> Any:
    from gentrain.config import build, load

    return build(schema, load(None, overrides or (), values))


def _execute(schema: type[Any], values: dict[str, Any], overrides: list[str] | None, directory: Path) -> None:
    from gentrain.cluster.session import session

    stage = _stage(schema, values, overrides)
    with session():
        stage.execute(directory)


def _plain(component: Any) -> Any:
    from gentrain.config import to_dict

    return to_dict(component)


def _print_metrics(directory: Path) -> None:
    from gentrain.recipes.evaluate import read_metrics

    table = Table("metric", "value", "95 % interval", "better", title=_escape(str(directory)), title_justify="left")
    for metric in read_metrics(directory):
        table.add_row(_escape(metric["name"]), f"{metric['value']:.4g}", f"{metric['low']:.4g} to {metric['high']:.4g}", metric["better"])
    console.print(table)


from gentrain.cli import jobs, sweep  # noqa: F401  # add their commands to the app
