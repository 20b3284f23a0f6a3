"""Progress bars. That of a training run is read from its metrics: the same for every place a run can live in."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, track

from gentrain.training.run import METRICS, RunConfig

T = TypeVar("T")


def shown(parts: Iterable[T], count: int, what: str) -> Iterator[T]:
    """The parts as they come, with a progress bar; without one when the output is not a terminal."""
    console = Console(stderr=True)
    yield from track(parts, what, count, console=console, disable=not console.is_terminal)


@contextmanager
def follow(run: RunConfig) -> Iterator[None]:
    """Shows samples, loss, samples/s and ETA while the body trains the run; nothing when the output is not a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    detail_column = TextColumn("{task.fields[detail]}")
    columns = (TextColumn("{task.description}"), BarColumn(), detail_column, TimeElapsedColumn(), TimeRemainingColumn())
    done = threading.Event()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(run.output, total=run.training.samples, detail="starting")

        def watch() -> None:
            while not done.wait(0.5):
                record = last_record(run.directory / METRICS)
                if record:
                    losses = {key.removeprefix("loss/"): value for key, value in record.items() if key.startswith("loss/")}
                    loss = ", ".join(f"{role} {'not finite' if value is None else f'{value:.4g}'}" for role, value in losses.items())
                    detail = f"{record['samples']:,} samples · {record.get('samples_per_second', 0):,.0f}/s · loss {loss}"
                    progress.update(task, completed=record["samples"], detail=detail)

        thread = threading.Thread(target=watch, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def last_record(path: Path) -> dict[str, Any] | None:
    """The last line of a run's metrics; None if there is none yet."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 16_384))
            lines = file.read().decode(errors="replace").splitlines()
        record: dict[str, Any] = json.loads(lines[-1])
        return record
    except (OSError, ValueError, IndexError):  # not there yet, or a line being written
        return None
