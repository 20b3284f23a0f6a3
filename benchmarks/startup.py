"""From the command to the first optimiser step, and where the time goes.

    python benchmarks/startup.py              # --help, one process, two workers under Ray; about three minutes on two idle cores
    python benchmarks/startup.py --rounds 5 --no-ray

A first step has ended when the first line of metrics.jsonl is there (a line per step is asked for). The table of imports is Python's own
account (-X importtime) of the process that trains, each module's own time summed over the library that it belongs to.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

CONFIG = Path(__file__).parents[1] / "configs" / "mnist5k" / "flow_matching.yaml"
SHORT = ["training.samples=64", "training.batch_size=64", "training.log_every=64", "training.preview_every=0"]
SHOWN = 12  # libraries
LIMIT_S = 300.0


def first_step(overrides: list[str], *flags: str) -> tuple[float, str]:
    """Seconds from the start of the command to its first line of metrics, and what it wrote to stderr until its end."""
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, *flags, "-m", "gentrain.cli", "train", str(CONFIG), *SHORT, *overrides, f"output={directory}/run"]
        metrics, start = Path(directory, "run", "metrics.jsonl"), time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None or time.perf_counter() - start > LIMIT_S:
                    break
                time.sleep(0.01)
            seconds = time.perf_counter() - start
            process.wait(LIMIT_S)
        finally:
            process.kill()
        errors.seek(0)
        told = errors.read()
        if process.returncode or not metrics.exists():
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}:\n{told[-2_000:]}")
        return seconds, told


def shown_help() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "gentrain.cli", "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def imports(told: str) -> Counter[str]:
    """Library -> seconds of its modules' own code, from the output of -X importtime."""
    spent: Counter[str] = Counter()
    for own, module in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)$", told, re.MULTILINE):
        spent[module.partition(".")[0]] += int(own)
    return Counter({library: microseconds / 1e6 for library, microseconds in spent.items()})


def main(
    rounds: Annotated[int, typer.Option(help="of each command; the first of all is not counted: it fills the disk's cache")] = 3,
    ray: Annotated[bool, typer.Option(help="also two workers under Ray")] = True,
) -> None:
    commands = {"gentrain --help": shown_help, "one process": lambda: first_step([])[0]}
    if ray:
        commands["two workers under Ray"] = lambda: first_step(["cluster.place=ray", "cluster.workers=2"])[0]
    console = Console()
    table = Table("command", "seconds", "from", "to", title=f"to the first step ({rounds} rounds)")
    first_step([])
    for name, command in commands.items():
        seconds = [command() for _ in range(rounds)]
        table.add_row(name, *(f"{value:.2f}" for value in (statistics.median(seconds), min(seconds), max(seconds))))
    console.print(table)
    seconds, told = first_step([], "-X", "importtime")
    spent = imports(told)
    table = Table("library", "seconds", title=f"imports of one process, {sum(spent.values()):.1f} of {seconds:.1f} s")
    for library, share in spent.most_common(SHOWN):
        table.add_row(library, f"{share:.2f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
