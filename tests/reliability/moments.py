"""`python -m tests.reliability.moments FOLDER`: the command in forks of this process, since importing torch takes most of a short run.

Each ends as a process of its own does, through the end of the interpreter.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import sys
import time
from pathlib import Path

import torch.utils.tensorboard  # noqa: F401  # as a run does, once for all forks

from gentrain import report  # noqa: F401
from gentrain.cli import main
from gentrain.cluster import launch
from gentrain.recipes import evaluate  # noqa: F401

CASES: dict[str, tuple[str, ...]] = {  # name -> MOMENT, and the command where it is another one
    "fit": ("fit SIGUSR1",),
    "step": ("step SIGHUP",),
    "nohup": ("step SIGHUP",),
    "step-exit": ("step exit",),
    "finished": ("finished SIGTERM",),
    "end": ("end SIGUSR1",),
    "other": ("step SIGUSR2",),
    "deaf": ("step SIGTERM",),
    "terminal": ("step wait", "train", "run.yaml", "training.samples=1_000_000", "training.log_every=1_000_000"),
    "recipe": ("stage SIGTERM", "run", "recipe.yaml"),
    "again": ("", "run", "recipe.yaml"),
    "stage-exit": ("stage exit", "run", "recipe.yaml", "output=left"),
}


def prepare(name: str, folder: Path) -> None:
    """What is special about a case, in its process."""
    if name == "nohup":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if name == "finished":
        note = launch.note

        def noted(directory: Path, event: str, **details: object) -> None:
            note(directory, event, **details)
            if event == "finished":
                os.kill(os.getpid(), signal.SIGTERM)

        launch.note = noted  # type: ignore[attr-defined]
    if name == "deaf":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
    elif name != "terminal":
        said = os.open(folder / f"{name}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)


def fork(name: str, folder: Path) -> int | None:
    """None in the process of the case; in this one the exit status of that, negative for a signal."""
    pid, terminal = pty.fork() if name == "terminal" else (os.fork(), -1)
    if pid == 0:
        return None
    if name == "terminal":
        while not (folder / "marker").exists():
            time.sleep(0.05)
        os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have begun them under nohup
statuses: dict[str, int] = {}
folder = Path(sys.argv[1])
for name, (moment, *command) in CASES.items():
    status = fork(name, folder)
    if status is None:
        prepare(name, folder)
        os.environ |= {"MOMENT": moment, "MARKER": str(folder / "marker")}
        sys.argv = ["gentrain", *(command or ["train", "run.yaml", f"output={folder / name}"])]
        main()
    else:
        statuses[name] = status
(folder / "statuses.json").write_text(json.dumps(statuses))
