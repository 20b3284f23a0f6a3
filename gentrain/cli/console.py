"""Where the command prints."""

from __future__ import annotations

import os

import rich.console


class Console(rich.console.Console):
    def on_broken_pipe(self) -> None:
        """Whoever read it has gone (`| head`, a `tee` that the same Ctrl-C ended): the command goes on, silent, to its own status."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
