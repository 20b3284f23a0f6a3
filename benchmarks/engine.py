"""Time per optimiser step of `engine: torch` and DeepSpeed ZeRO 0-3, each against a hand-written loop over the same data and network.

    python benchmarks/engine.py                      # 0.7M and 34M parameters, one process and two ranks; about 20 minutes on two cores
    python benchmarks/engine.py --ray                # also under Ray Train
    python benchmarks/engine.py --size small --rounds 9 --ranks 1

Each entry is a run with everything that a run does (data, noise, clipping, averages, a line of metrics), and between two of its steps
the hand-written loop makes one of its own, so that whatever else the machine does meets both. That loop has a network, an optimiser, a
loader and an average of its own, draws torch's noise, clips, and is under DistributedDataParallel on two ranks. Printed: medians of rank 0
over the steps of all rounds, of wall time and of processor time (which other processes hardly touch), the medians of the rounds' ratios,
and their extremes. Every round builds the networks anew: where memory happens to lie makes some per cent between equal loops.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from rich.console import Console
from rich.table import Table

from gentrain.cluster.session import session
from gentrain.data.loader import Loader
from gentrain.models.denoiser import Denoiser, drop_condition
from gentrain.training.callbacks import Callback, MetricsFile
from gentrain.training.loop import Trainer, train
from gentrain.training.roles import build_network
from gentrain.training.run import RunConfig, load_run
from gentrain.training.world import World, join, leave

CONFIG = Path(__file__).parents[1] / "configs" / "mnist5k" / "flow_matching.yaml"
STEPS, WARM_UP = 12, 3
SIZES = {
    "small": ["training.batch_size=64"],
    "large": ["training.batch_size=4", "model.channels=[224,448]"],
}
ENGINES = {
    "engine: torch": ["engine={name: torch}"],
    **{f"ZeRO {stage}": [f"engine={{name: deepspeed, zero_stage: {stage}}}"] for stage in range(4)},
}

Seconds = tuple[float, float]  # wall, processor
Pair = tuple[Seconds, Seconds]  # a step of gentrain, a step by hand


def configured(size: str, engine: list[str], output: Path, extra: tuple[str, ...] = ()) -> RunConfig:
    run = load_run(CONFIG, [*SIZES[size], *engine, "training.preview_every=0", f"output={output}", *extra])
    run.training.samples = STEPS * run.training.batch_size
    run.training.log_every = WARM_UP * run.training.batch_size
    return run


def by_hand(run: RunConfig, world: World) -> Iterator[None]:
    """The loop that somebody writes who needs nothing but this one run; it pauses after every step."""
    network: torch.nn.Module = build_network(run, "model")
    average = [p.detach().clone() for p in network.parameters()]
    if world.size > 1:
        network = torch.nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    denoiser = Denoiser(network, run.path, run.prediction)
    for (batch,) in Loader(run.data.split("train"), run.seed, run.training.batch_size, world.rank, world.size):
        x0, eps, t = batch["x"], torch.randn_like(batch["x"]), torch.randn(len(batch["x"])).sigmoid()
        condition = drop_condition({"label": batch["label"]}, torch.rand(len(t)) < 0.1)
        predicted = denoiser.velocity(run.path.perturb(x0, eps, t), t, condition)
        loss = (predicted - run.path.velocity(x0, eps, t)).square().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        if norm.isfinite():
            optimizer.step()
            torch._foreach_lerp_(average, [p.detach() for p in network.parameters()], 0.01)
        optimizer.zero_grad()
        yield


def _since(start: Seconds) -> Seconds:
    return time.perf_counter() - start[0], time.process_time() - start[1]


class _Beside(Callback):
    """Lets the hand-written loop make a step after each of the run's, and times both."""

    pairs: ClassVar[list[Pair]] = []

    def __init__(self, trainer: Trainer):
        self.pairs.clear()
        self._loop = by_hand(trainer.run, trainer.world)
        self._started: Seconds | None = None

    def after_step(self, trainer: Trainer) -> None:
        ours = _since(self._started) if self._started else None
        start = _since((0, 0))
        next(self._loop)
        if ours:
            self.pairs.append((ours, _since(start)))
        self._started = _since((0, 0))


def measure(world: World, size: str, rounds: int, root: str) -> dict[str, list[list[Pair]]]:
    """Entry -> round -> steps after the warm-up. Every rank calls it."""
    logging.disable(logging.WARNING)
    results: dict[str, list[list[Pair]]] = {name: [] for name in ENGINES}
    for number in range(rounds):
        for name, engine in ENGINES.items():
            run = configured(size, engine, Path(root, f"{number}-{name[-1]}"))
            run.directory.mkdir(parents=True, exist_ok=True)
            train(run, world, lambda: False, [MetricsFile, _Beside])
            results[name].append(_Beside.pairs[WARM_UP - 1 :])
            gc.collect()  # engines hold themselves in circles: at 34M parameters fifteen runs would fill the memory
    return results


def _rank(rank: int, port: int, arguments: tuple[Any, ...], results: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    found = measure(join(), *arguments)
    leave()
    if rank == 0:
        results.put(found)


def spawned(*arguments: Any) -> dict[str, list[list[Pair]]]:
    """`measure` on two ranks, one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_rank, args=(rank, port, arguments, results), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    found = results.get(timeout=3600)
    for process in processes:
        process.join()
    return found


def report(title: str, results: dict[str, list[list[Pair]]]) -> None:
    rounds = len(results["engine: torch"])
    table = Table("", "wall, ms", "by hand", "ratio", "processor, ms", "by hand", "ratio", title=f"{title}, {rounds} rounds")
    for name, found in results.items():
        cells = []
        for kind in (0, 1):
            ours, theirs = (statistics.median(pair[who][kind] for steps in found for pair in steps) for who in (0, 1))
            ratios = [statistics.median(our[kind] / their[kind] for our, their in steps) for steps in found]
            cells += [
                f"{1e3 * ours:.1f}",
                f"{1e3 * theirs:.1f}",
                f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
            ]
        table.add_row(name, *cells)
    Console(width=130).print(table)


def under_ray(root: str, *arguments: Any) -> dict[str, list[list[Pair]]]:
    """`measure` on two workers of Ray Train, one core each."""
    from ray.train import RunConfig as RayRunConfig
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    def on_worker() -> dict[str, list[list[Pair]]]:
        torch.set_num_threads(1)
        return measure(join(), *arguments)

    with session():
        trainer = TorchTrainer(
            on_worker,
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RayRunConfig(name="ray", storage_path=root, worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}}),
        )
        found: dict[str, list[list[Pair]]] = trainer.fit().return_value
    return found


def machine() -> str:
    here = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True).stdout.strip()
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    processor = f"{model or platform.processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    return f"{processor}, Python {platform.python_version()}, torch {torch.__version__}, commit {commit}"


def main(
    size: Annotated[list[str], typer.Option(help="small (0.7M, batch 64) or large (34M, batch 4)")] = ["small", "large"],  # noqa: B006
    ranks: Annotated[list[int], typer.Option(help="1 (in this process) or 2 (spawned)")] = [1, 2],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="repetitions of every entry")] = 5,
    ray: Annotated[bool, typer.Option(help="also two workers under Ray Train")] = False,
) -> None:
    torch.set_num_threads(1)
    print(machine())
    with tempfile.TemporaryDirectory() as root:
        for each in size:
            if 1 in ranks:
                report(f"{each}, one process", measure(join(), each, rounds, f"{root}/{each}-1"))
            if 2 in ranks:
                report(f"{each}, two ranks", spawned(each, rounds, f"{root}/{each}-2"))
            if ray:
                report(f"{each}, two workers under Ray Train", under_ray(root, each, rounds, f"{root}/{each}-ray"))
    leave()
    print(machine())


if __name__ == "__main__":
    typer.run(main)
