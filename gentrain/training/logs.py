"""What each rank of a run says, as lines of JSON in the run's directory, beside what its terminal shows."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gentrain.training.world import World

LOGS = "logs"


class _Lines(logging.Handler):
    """One file per rank, since lines of several hosts may mix in one. A line that cannot be written is lost: the run is not."""

    def __init__(self, directory: Path, world: World, attempt: str):
        super().__init__()
        self._path = directory / LOGS / f"rank-{world.rank}.jsonl"
        self._about = {"run": directory.name, "attempt": attempt, "rank": world.rank}

    def emit(self, record: logging.LogRecord) -> None:
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(record.created))
        line = json.dumps({"time": when, "level": record.levelname, **self._about, "message": record.getMessage()})
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(line + "\n")


@contextmanager
def logged(directory: Path, world: World, attempt: str) -> Iterator[None]:
    """Within it gentrain's messages are appended to <run>/logs/rank-<n>.jsonl, with run, attempt and rank; at last why the body failed."""
    logger, lines = logging.getLogger("gentrain"), _Lines(directory, world, attempt)
    added: list[logging.Handler] = [lines]
    if not logger.hasHandlers() and logging.lastResort is not None:
        added.append(logging.lastResort)  # which Python leaves out where there is another one
    level = logger.level
    logger.setLevel(level or logging.INFO)  # a worker of Ray Train has none
    for handler in added:
        logger.addHandler(handler)
    try:
        yield
    except Exception as error:
        # To this file only: the caller tells it where people look.
        lines.handle(logger.makeRecord(logger.name, logging.ERROR, __file__, 0, f"{type(error).__name__}: {error}", (), None))
        raise
    finally:
        for handler in added:
            logger.removeHandler(handler)
        logger.setLevel(level)
