"""Where the command prints."""

from __future__ import annotations

import logging
import os

import rich.console
from rich.logging import RichHandler


class Console(rich.console.Console):
    def on_broken_pipe(self) -> None:
        """Whoever read it has gone (`| head`, a `tee` that the same Ctrl-C ended): the command goes on, silent, to its own status."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class _Once(logging.Filter):
    """One command reads a configuration several times: what is to be told of it is told once."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name != "gentrain.training.run":
            return True
        said = record.getMessage()
        fresh = said not in self._told
        self._told.add(said)
        return fresh


def warnings_on(console: Console) -> logging.Handler:
    handler = RichHandler(console=console, show_path=False)
    handler.addFilter(_Once())
    return handler
