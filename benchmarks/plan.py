"""What `gentrain plan` says that a process will hold, against what engines do hold and autograd does save in real steps.

    python benchmarks/plan.py                 # a UNet of 34M parameters, every engine on two ranks; about 15 minutes on two cores
    python benchmarks/plan.py --ranks 1

State is every tensor that the process can reach between two steps, once per storage, less those of before the run was built; gradients
are what there is more as a step begins. Activations are what the saved-tensor hooks of autograd count, once per storage and weights aside,
as the loss of a real step ends. Peaks are what is there more at the most while a role learns, in whatever operation of a real update makes
it; on a CPU the host's part of an offloaded step is among it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import tempfile
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from gentrain.methods.base import Clock, Update
from gentrain.noise import Noise
from gentrain.training.activations import LiveTensors, SavedTensors, storage_of
from gentrain.training.batches import batches, encoded
from gentrain.training.memory import Memory, memory_of
from gentrain.training.roles import Roles
from gentrain.training.run import RunConfig, load_run
from gentrain.training.world import World, join, leave

CONFIG = Path(__file__).parents[1] / "configs" / "mnist5k" / "flow_matching.yaml"
LARGE = ["training.batch_size=4", "training.preview_every=0", "model.channels=[224,448]"]
ENGINES = {
    "torch": "{name: torch}",
    "torch, bf16": "{name: torch, precision: bf16}",
    "ZeRO 0": "{name: deepspeed, zero_stage: 0}",
    **{
        f"ZeRO {stage}{', bf16' if precision == 'bf16' else ''}": f"{{name: deepspeed, zero_stage: {stage}, precision: {precision}}}"
        for precision in ("fp32", "bf16")
        for stage in (1, 2, 3)
    },
    **{
        f"ZeRO {stage}, bf16, offloaded": f"{{name: deepspeed, zero_stage: {stage}, precision: bf16, offload_optimizer: true}}"
        for stage in (1, 2, 3)
    },
}


@dataclass
class Found:
    """Bytes on one rank. gradients, saved, peak: role -> of its dearest update."""

    resting: int
    gradients: dict[str, int]
    saved: dict[str, int]
    peak: dict[str, int]


def reachable() -> dict[int, int]:
    """Storage -> bytes, of every tensor that Python can reach."""
    gc.collect()
    found: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # isinstance makes some deprecated objects speak
        tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    for tensor in tensors:
        for each in (tensor, tensor.grad if tensor.is_leaf else None):
            size = 0 if each is None or each.is_meta else each.untyped_storage().nbytes()
            if size:  # ZeRO-3 leaves empty tensors, whose addresses those that are gathered take over
                found[storage_of(each)] = size
    return found


def measure(world: World, run: RunConfig, steps: int = 2) -> Found:
    """What this rank of a real run holds. Every rank calls it."""
    clock = Clock(0, run.training.batch_size, steps * run.training.batch_size)
    read = [next(batches(run, world, run.codec(), {}, 0)) for _ in range(steps)]  # the data come into memory before anything is counted
    before = reachable()
    roles = Roles(run, world)
    gradients: dict[str, int] = {}
    saved: dict[str, int] = {}
    peak: dict[str, int] = {}
    for step, micro_batches in enumerate(read):
        looked_at = step == steps - 1  # with the optimisers' state
        for update in run.method.updates(clock):
            assert isinstance(update, Update)
            role, there = update.role, reachable() if looked_at else {}
            passes = [(loss, batch) for loss in update.losses for batch in micro_batches]
            with LiveTensors(set(there)) if looked_at else nullcontext() as made:
                with roles.stepping(role) as nets:
                    for place, (loss, rows) in enumerate(passes):
                        batch = encoded(rows, run.data, roles.codec, run.seed, world.device)
                        with SavedTensors({*there, *map(storage_of, batch.values())}) as hooks:
                            value = loss(nets, batch, Noise(place, batch["index"])).value
                            saved[role] = max(saved.get(role, 0), hooks.bytes()) if looked_at else 0
                        roles.engines[role].backward(value, last=place == len(passes) - 1)
                        del batch, value
                gradients[role] = sum(reachable().values()) - sum(there.values()) if looked_at else 0
                roles.engines[role].step(1e-4)
            peak[role] = max(peak.get(role, 0), made.peak if made is not None else 0)
            if roles.engines[role].ema is not None:
                roles.engines[role].update_ema(0.9)
    resting = sum(size for storage, size in reachable().items() if storage not in before)
    return Found(resting, gradients, saved, peak)


def compare(world: World, configurations: dict[str, list[str]], root: str) -> dict[str, Found]:
    found = {}
    for index, (name, overrides) in enumerate(configurations.items()):
        run = load_run(CONFIG, [*LARGE, *overrides, f"output={root}/{index}"])
        found[name] = measure(world, run)
        gc.collect()
    return found


def _rank(rank: int, port: int, arguments: tuple[Any, ...], results: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    results.put((rank, compare(join(), *arguments)))
    leave()


def spawned(*arguments: Any) -> list[dict[str, Found]]:
    """`compare` on two ranks, one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_rank, args=(rank, port, arguments, results), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=3600) for _ in processes]
    for process in processes:
        process.join()
    return [each for _, each in sorted(found, key=lambda pair: pair[0])]


def report(title: str, planned: dict[str, Memory], found: list[dict[str, Found]]) -> None:
    """Planned bytes against the most on any rank, in MiB."""
    columns = ("state", "planned", "off by", "gradients", "planned", "activations", "planned", "off by", "peak", "planned", "off by")
    table = Table("", *columns, title=title)
    for name, memory in planned.items():
        part = next(part for part in memory.parts if part.held is not None)
        assert part.held is not None and part.activations is not None
        resting = max(each[name].resting for each in found)
        gradients, saved, peak = (max(getattr(each[name], what)["model"] for each in found) for what in ("gradients", "saved", "peak"))
        there, expected = memory.resting + memory.host, part.activations.saved + part.gathered
        table.add_row(
            name, *_compared(resting, there, 3), _mib(gradients), _mib(part.held.gradients), *_compared(saved, expected, 2),
            *_compared(peak, part.learning, 0),
        )  # fmt: skip
    Console(width=150).print(table)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def _compared(found: int, planned: int, digits: int) -> tuple[str, str, str]:
    return _mib(found), _mib(planned), f"{100 * (planned / found - 1):+.{digits}f} %"


def main(
    ranks: Annotated[list[int], typer.Option(help="1 (in this process) or 2 (spawned)")] = [1, 2],  # noqa: B006
    only: Annotated[str, typer.Option(help="entries whose name holds this")] = "",
) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    entries = {name: [f"engine={engine}"] for name, engine in ENGINES.items()}
    adapter = "adapter={rank: 16, targets: [convolutions, linear]}"
    entries |= {f"{name}, adapter": [*entries[name], adapter] for name in ("torch", "ZeRO 2, bf16", "ZeRO 3, bf16")}
    entries = {name: overrides for name, overrides in entries.items() if only in name}
    for size in ranks:
        place = ["cluster={place: ray, workers: 2}"] if size == 2 else []
        planned = {name: memory_of(load_run(CONFIG, [*LARGE, *overrides, *place])) for name, overrides in entries.items()}
        with tempfile.TemporaryDirectory() as root:
            found = spawned(entries, root) if size == 2 else [compare(join(), entries, root)]
        report(f"{size} {'process' if size == 1 else 'ranks'}, MiB per process", planned, found)
    leave()


if __name__ == "__main__":
    typer.run(main)
