"""Processor time of a step of distillation against the sum of the network passes that it cannot do without; memory of adapters as roles.

    python benchmarks/distillation.py                # the 0.7M UNet of configs/mnist5k, batch 64; a few minutes on one core
    python benchmarks/distillation.py --rounds 9
    python benchmarks/distillation.py --memory       # a UNet of 34M parameters: three networks, and adapters on one; a minute. Linux

A step is the trainer's: noise, losses, backward passes, clipping, optimisers and the student's average. The passes are timed bare, between
the steps, on networks of the same size: a forward without gradient, a forward and backward to the weights, the same to the input only, and
an optimiser's step. Printed: medians over the rounds, and their ratio.

Memory is the most that a process had resident in its first two steps, less what it had with the data read and no network built, beside what
`gentrain plan` says. A process of its own measures each.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from gentrain.config import Document
from gentrain.training.batches import batches
from gentrain.training.callbacks import Callback
from gentrain.training.loop import Trainer, train
from gentrain.training.memory import memory_of
from gentrain.training.roles import build_network
from gentrain.training.run import parse_run, save_config
from gentrain.training.world import join, leave

BATCH, WARM_UP = 64, 2
# passes of one step: forwards without gradient, forward and backward to weights, to the input only, optimiser steps
CASES = {
    "vsd": ({"generator_loss": "vsd"}, (3, 2, 0, 2)),
    "dmd": ({"generator_loss": "dmd"}, (3, 2, 0, 2)),
    "dmd, guidance 2": ({"generator_loss": "dmd", "guidance": 2.0}, (4, 2, 0, 2)),
    "dmd2 (critic)": ({"generator_loss": "dmd", "critic_weight": 0.01}, (4, 4, 1, 3)),
    "dmd2 (heads on the teacher)": ({"generator_loss": "dmd", "critic_weight": 0.01, "critic_heads": {}}, (6, 2, 1, 2)),
    "ladd": ({"generator_loss": "ladd", "critic_weight": 1.0}, (3, 1, 1, 1)),
    "kl (critic)": ({"generator_loss": "kl"}, (5, 4, 0, 3)),
    "sid": ({"generator_loss": "sid"}, (1, 2, 2, 2)),
    "dmd, 4 steps": ({"generator_loss": "dmd", "steps": 4}, (9, 2, 0, 2)),
}
LARGE = {"name": "unet", "channels": [224, 448], "space_to_depth": 2}
ADAPTER = {"rank": 8, "targets": ["linear", "convolutions"]}


def settings(directory: Path, method: dict[str, object] | str) -> Document:
    values = {
        "method": method,
        "data": "mnist5k",
        "model": {"name": "unet", "channels": [32, 64], "space_to_depth": 2},
        "engine": "torch",
        "training": {"samples": BATCH, "batch_size": BATCH, "log_every": 10**9},
        "output": str(directory / "run"),
    }
    return Document(values, "benchmark")


class Passes:
    """Bare passes of one network on one batch; each call gives the seconds of all four."""

    def __init__(self, network: torch.nn.Module):
        self.network, self.x, self.t = network, torch.randn(BATCH, 1, 28, 28), torch.rand(BATCH)
        self.condition = {"label": torch.arange(BATCH) % 10}
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)

    def __call__(self) -> tuple[float, ...]:
        with torch.no_grad():
            forward = timed(lambda: self._run(self.x))
        weights = timed(lambda: self._run(self.x).square().mean().backward())
        step = timed(self.optimizer.step)
        self.network.requires_grad_(False)
        x = self.x.clone().requires_grad_()
        through = timed(lambda: self._run(x).square().mean().backward())
        self.network.requires_grad_(True)
        return forward, weights, through, step

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.network(x, self.t, self.condition)
        return output


def timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


class Watch(Callback):
    """After each step, one round of bare passes."""

    def __init__(self, trainer: Trainer):
        self.passes = Passes(build_network(trainer.run, "student"))
        self.steps: list[float] = []
        self.bare: list[tuple[float, ...]] = []
        self.start = time.process_time()

    def after_step(self, trainer: Trainer) -> None:
        self.steps.append(time.process_time() - self.start)
        self.bare.append(self.passes())
        self.start = time.process_time()


def measure(directory: Path, method: dict[str, object], counts: tuple[int, ...], rounds: int) -> tuple[float, float]:
    """Median seconds of a step, and of its passes."""
    document = settings(directory, {"name": "distribution_matching", **method})
    document.values |= {"roles": {"teacher": {"weights": str(directory / "teacher")}}, "output": tempfile.mkdtemp(dir=directory)}
    document.values["training"] |= {"samples": BATCH * (WARM_UP + rounds)}
    run, watches = parse_run(document), []

    def watch(trainer: Trainer) -> Watch:
        watches.append(Watch(trainer))
        return watches[0]

    train(run, join(), lambda: False, [watch])
    steps, bare = watches[0].steps[WARM_UP:], watches[0].bare[WARM_UP:]
    return statistics.median(steps), statistics.median(sum(n * s for n, s in zip(counts, each, strict=True)) for each in bare)


class Peak(Callback):
    """Ends nothing; tells the peak of the resident memory after the second step."""

    def __init__(self, trainer: Trainer):
        self.steps, self.bytes = 0, 0

    def after_step(self, trainer: Trainer) -> None:
        self.steps += 1
        if self.steps == 2:
            self.bytes = resident("VmHWM")


def resident(key: str) -> int:
    """VmRSS: bytes resident now. VmHWM: the most since `clear_refs` was written."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def peak(values: dict[str, Any]) -> tuple[int, int]:
    """(peak, planned) bytes of a run of two steps, in a process that has done nothing else."""
    torch.set_num_threads(1)
    run, watches = parse_run(Document(values, "benchmark")), []
    planned, world = memory_of(run).peak, join()
    next(batches(run, world, run.codec(), {}, 0))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")

    def watch(trainer: Trainer) -> Peak:
        watches.append(Peak(trainer))
        return watches[0]

    train(run, world, lambda: False, [watch])
    leave()
    return watches[0].bytes - before, planned


def compare_memory() -> None:
    torch.set_num_threads(1)
    table = Table("roles", "peak, MiB", "planned, MiB")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        few = {"samples": 8, "batch_size": 4, "log_every": 10**9, "preview_every": 0}
        teacher = settings(directory, "flow_matching").values | {"model": LARGE, "training": few, "output": str(directory / "teacher")}
        run = parse_run(Document(teacher, "benchmark"))
        save_config(run)
        train(run, join(), lambda: False, [])
        leave()
        for name, adapter in {"three networks": None, "two adapters of rank 8 on one network": ADAPTER}.items():
            values = settings(directory, {"name": "distribution_matching", "generator_loss": "dmd"}).values
            values |= {"model": LARGE, "roles": {"teacher": {"weights": str(directory / "teacher")}}, "adapter": adapter}
            values |= {"training": few, "output": tempfile.mkdtemp(dir=directory)}
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                found = process.submit(peak, values).result()
            table.add_row(name, *(f"{each / 2**20:.0f}" for each in found))
    Console().print(table)


def main(
    rounds: Annotated[int, typer.Option(help="Steps that count, of each method.")] = 5,
    memory: Annotated[bool, typer.Option("--memory", help="Memory of adapters as roles, in place of times.")] = False,
) -> None:
    if memory:
        compare_memory()
        return
    torch.set_num_threads(1)
    table = Table("method", "step, s", "passes, s", "ratio")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        teacher = settings(directory, "flow_matching")
        teacher.values["output"] = str(directory / "teacher")
        run = parse_run(teacher)
        save_config(run)
        train(run, join(), lambda: False, [])
        for name, (method, counts) in CASES.items():
            step, passes = measure(directory, method, counts, rounds)
            table.add_row(name, f"{step:.3f}", f"{passes:.3f}", f"{step / passes:.2f}")
    leave()
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
