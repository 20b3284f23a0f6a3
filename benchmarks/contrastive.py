"""Time and memory of the pairwise sigmoid loss, forward and backward, and of open_clip's SigLipLoss beside it.

    python benchmarks/contrastive.py                                   # ours only
    pip download open_clip_torch --no-deps -d wheel && unzip -o wheel/*.whl open_clip/loss.py -d wheel
    python benchmarks/contrastive.py --peer wheel/open_clip/loss.py    # that file alone is loaded: the package would bring torchvision
    python benchmarks/contrastive.py --batches 1024,4096 --ranks 2 --rounds 5

Each number of ranks gets processes of its own, one thread each; the losses take turns within a round, in the same processes. Printed for
rank 0: the median over the rounds of wall and of processor time (which other processes hardly touch), and the highest resident memory
during a call above that before it (Linux resets the mark through /proc/self/clear_refs; null elsewhere). What earlier calls have freed is
given back to the system first, or the next call would take it from there unseen.
"""

from __future__ import annotations

import ctypes
import importlib.util
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gentrain.methods.contrastive_loss import Exchange, sigmoid_contrastive_loss
from gentrain.training.world import RankGroup, join, leave

WIDTH = 128
EXCHANGES: tuple[Exchange, ...] = ("two_way_ring", "ring", "gather")
Call = Callable[[], Tensor]
Row = tuple[str, float, float, float | None]  # loss, wall seconds, processor seconds, MiB


def _peak_mib() -> float | None:
    """Highest resident memory since the mark was reset; None where the system does not tell."""
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) / 1024


def _reset_peak() -> None:
    if Path("/proc/self/clear_refs").exists():
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)  # of glibc
        Path("/proc/self/clear_refs").write_text("5")


def _measured(call: Call, rounds: list[tuple[float, float, float | None]]) -> None:
    _reset_peak()
    before, wall, processor = _peak_mib(), time.perf_counter(), time.process_time()
    call().backward()
    rounds.append((time.perf_counter() - wall, time.process_time() - processor, None))
    after = _peak_mib()
    if before is not None and after is not None:
        rounds[-1] = (*rounds[-1][:2], after - before)


def _calls(batch: int, rank: int, ranks: int, peer: str | None) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(rank)
    image, text = (torch.randn(batch // ranks, WIDTH, generator=generator, requires_grad=True) for _ in range(2))
    scale, bias = nn.Parameter(torch.tensor([2.3])), nn.Parameter(torch.tensor([-10.0]))
    group = RankGroup(ranks)

    def ours(exchange: Exchange) -> Call:
        return lambda: sigmoid_contrastive_loss(image, text, scale, bias, group=group, exchange=exchange)

    calls = {exchange: ours(exchange) for exchange in (EXCHANGES if ranks > 1 else EXCHANGES[:1])}
    if peer is not None:
        theirs: Any = _load(peer).SigLipLoss(rank=rank, world_size=ranks)

        def unit(x: Tensor) -> Tensor:
            return nn.functional.normalize(x, dim=1)

        calls["open_clip"] = lambda: theirs(unit(image), unit(text), scale.exp(), bias)
    return calls


def _load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _rank_main(environment: dict[str, str], batches: list[int], rounds: int, peer: str | None, results: Any) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    world = join()
    for batch in batches:
        calls = _calls(batch, world.rank, world.size, peer)
        found: dict[str, list[tuple[float, float, float | None]]] = {name: [] for name in calls}
        for number in range(rounds + 1):
            for name, call in calls.items():
                _measured(call, found[name] if number else [])  # the first round warms up
        if world.is_main:
            rows = []
            for name, each in found.items():
                wall, processor, memory = zip(*each, strict=True)
                peaks = [value for value in memory if value is not None]
                rows.append((name, statistics.median(wall), statistics.median(processor), statistics.median(peaks) if peaks else None))
            results.put((batch, rows))
    leave()


def _run(ranks: int, batches: list[int], rounds: int, peer: str | None) -> list[tuple[int, list[Row]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        context.Process(target=_rank_main, args=({**shared, "RANK": str(rank), "LOCAL_RANK": "0"}, batches, rounds, peer, results))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=1800) for _ in batches]
    for process in processes:
        process.join()
    return found


def main(
    batches: Annotated[str, typer.Option(help="global batches")] = "1024,4096,16384",
    ranks: Annotated[str, typer.Option(help="numbers of ranks")] = "1,2,4",
    rounds: Annotated[int, typer.Option(help="measured rounds")] = 3,
    peer: Annotated[str | None, typer.Option(help="open_clip's loss.py")] = None,
) -> None:
    """Measures and prints one table."""
    table = Table("ranks", "batch", "loss", "wall s", "processor s", "MiB", title=f"width {WIDTH}, float32, median of {rounds} rounds")
    for count in map(int, ranks.split(",")):
        for batch, rows in _run(count, [int(size) for size in batches.split(",")], rounds, peer):
            for name, wall, processor, memory in rows:
                table.add_row(
                    str(count), str(batch), name, f"{wall:.3f}", f"{processor:.3f}", "" if memory is None else f"{memory:.0f}"
                )  # fmt: skip
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
