"""What a CUDA device does: steps per second, peak memory and first losses of every engine against a hand-written loop, as one table.

    python benchmarks/gpu.py                     # 0.7M, 34M and 400M parameters; neither Ray nor a network is needed
    python benchmarks/gpu.py --device cpu --size 0.7M --batch 4    # whether the script itself works

Each entry is a run with all that a run does, in this process, on one device. `by hand` is what somebody writes who needs nothing but
this: the same network, data, loss, clipping, fused AdamW and average. `planned` is what `gentrain plan --memory` says of the same
configuration, which leaves out what CUDA and its libraries keep for themselves. An entry that fails is told of in its row. Without a CUDA
device it says so and ends with status 0.
"""

from __future__ import annotations

import gc
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from gentrain.data.loader import Loader
from gentrain.models.denoiser import Denoiser, drop_condition
from gentrain.training.callbacks import Callback
from gentrain.training.loop import Trainer, train
from gentrain.training.memory import memory_of
from gentrain.training.roles import build_network
from gentrain.training.run import RunConfig, load_run
from gentrain.training.world import join, leave

CONFIG = Path(__file__).parents[1] / "configs" / "mnist5k" / "flow_matching.yaml"
SIZES = {"0.7M": [], "34M": ["model.channels=[224,448]"], "400M": ["model.channels=[768,1536]"]}
ENTRIES = {
    "torch fp32": ["engine={name: torch}"],
    "torch bf16": ["engine={name: torch, precision: bf16}"],
    "torch bf16, compiled": ["engine={name: torch, precision: bf16}", "training.compile=true"],
    "torch bf16, recompute": ["engine={name: torch, precision: bf16}", "training.recompute=true"],
    "ZeRO 0 fp32": ["engine={name: deepspeed, zero_stage: 0}"],
    **{f"ZeRO {stage} bf16": [f"engine={{name: deepspeed, zero_stage: {stage}, precision: bf16}}"] for stage in (1, 2, 3)},
}
BY_HAND = {"fp32": False, "bf16": True}
WARM_UP = 10
GIB = 2**30


@dataclass
class Measured:
    """steps: per second, the median over windows. peak: bytes of tensors. losses: of the first steps."""

    steps: float
    peak: int
    losses: list[float]


class _Clock:
    """Times windows of steps; the device is waited for at their ends only."""

    def __init__(self, device: torch.device, window: int):
        self.device, self.window, self.count, self.speeds = device, window, 0, list[float]()
        self._since = 0.0

    def step(self) -> None:
        self.count += 1
        if self.count >= WARM_UP and (self.count - WARM_UP) % self.window == 0:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            if self.count > WARM_UP:
                self.speeds.append(self.window / (now - self._since))
            self._since = now


def configured(size: str, entry: list[str], steps: int, batch: int, output: str) -> RunConfig:
    run = load_run(CONFIG, [*SIZES[size], *entry, f"training.batch_size={batch}", "training.preview_every=0", f"output={output}"])
    run.training.samples = (WARM_UP + steps) * run.training.batch_size
    run.training.log_every, run.training.checkpoint_every = run.training.batch_size, run.training.samples
    return run


def measured(run: RunConfig, device: torch.device, window: int) -> Measured:
    """A run of gentrain."""
    clock, losses = _Clock(device, window), list[float]()

    class Watch(Callback):
        def __init__(self, trainer: Trainer):
            trainer.run.training.log_every = trainer.run.training.batch_size

        def on_log(self, trainer: Trainer, record: Any) -> None:
            losses.append(record["loss/model"])
            if trainer.clock.step >= WARM_UP // 2:  # lines of metrics wait for the device
                trainer.run.training.log_every = trainer.clock.total

        def after_step(self, trainer: Trainer) -> None:
            clock.step()

    run.directory.mkdir(parents=True, exist_ok=True)
    _reset(device)
    train(run, replace(join(), device=device), lambda: False, [Watch])
    return Measured(statistics.median(clock.speeds), _peak(device), losses)


def by_hand(run: RunConfig, device: torch.device, window: int, bf16: bool) -> Measured:
    _reset(device)
    clock, losses = _Clock(device, window), list[float]()
    for loss in _steps_by_hand(run, device, bf16):
        if len(losses) < WARM_UP // 2:
            losses.append(loss.item())
        clock.step()
        if clock.count * run.training.batch_size >= run.training.samples:
            return Measured(statistics.median(clock.speeds), _peak(device), losses)
    raise AssertionError


def _steps_by_hand(run: RunConfig, device: torch.device, bf16: bool) -> Iterator[torch.Tensor]:
    network = build_network(run, "model").to(device)
    average = [p.detach().clone() for p in network.parameters()]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    denoiser = Denoiser(network, run.path, run.prediction)
    for (batch,) in Loader(run.data.split("train"), run.seed, run.training.batch_size):
        x0, label = batch["x"].to(device), batch["label"].to(device)
        eps, t = torch.randn_like(x0), torch.randn(len(x0), device=device).sigmoid()
        condition = drop_condition({"label": label}, torch.rand(len(t), device=device) < 0.1)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            predicted = denoiser.velocity(run.path.perturb(x0, eps, t), t, condition)
        loss = (predicted.float() - run.path.velocity(x0, eps, t)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in network.parameters()], 0.01)
        optimizer.zero_grad()
        yield loss.detach()


def _reset(device: torch.device) -> None:
    gc.collect()  # engines hold themselves in circles
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def row(name: str, found: Measured, hand: Measured, planned: int) -> list[str]:
    losses = " ".join(f"{loss:.3f}" for loss in found.losses[:3])
    return [
        name, f"{found.steps:.2f}", f"{hand.steps:.2f}", f"{hand.steps / found.steps:.3f}",
        f"{found.peak / GIB:.2f}", f"{hand.peak / GIB:.2f}", f"{planned / GIB:.2f}", losses,
    ]  # fmt: skip


def table_of(size: str, device: torch.device, steps: int, batch: int, entries: dict[str, list[str]], root: str) -> Table:
    columns = ["", "steps / s", "by hand", "time / by hand", "peak GiB", "by hand", "planned GiB", "first losses"]
    table = Table(*columns, title=f"{size} parameters, batch {batch}")
    hands = {name: by_hand(configured(size, [], steps, batch, root), device, steps // 3, bf16) for name, bf16 in BY_HAND.items()}
    for number, (name, entry) in enumerate(entries.items()):
        run = configured(size, entry, steps, batch, f"{root}/{size}-{number}")
        try:
            found = measured(run, device, steps // 3)
            assert all(map(math.isfinite, found.losses))
            table.add_row(*row(name, found, hands["bf16" if "bf16" in name else "fp32"], memory_of(run).peak))
        except Exception as error:  # what one entry lacks, the others may have
            table.add_row(name, _told(error))
        _reset(device)
    return table


def kernels(parameters: int, device: torch.device, steps: int) -> Table:
    """One step of AdamW over so many parameters: torch's fused kernel, which runs take, beside DeepSpeed's where it can be built."""
    table = Table("AdamW", "ms a step", title=f"{parameters:,} parameters, float32")
    makers = {"torch, loops": {"foreach": False}, "torch, foreach": {"foreach": True}, "torch, fused": {"fused": True}}
    for name in [*makers, *(["DeepSpeed's FusedAdam"] if device.type == "cuda" else [])]:
        weights = [torch.nn.Parameter(torch.zeros(each, device=device)) for each in [parameters // 64] * 64]
        for p in weights:
            p.grad = torch.ones_like(p)
        try:
            optimizer = torch.optim.AdamW(weights, **makers[name]) if name in makers else _fused(weights)
            clock = _Clock(device, max(1, steps // 3))
            for _ in range(WARM_UP + steps):
                optimizer.step()
                clock.step()
            table.add_row(name, f"{1e3 / statistics.median(clock.speeds):.3f}")
        except Exception as error:  # it is compiled as it is made
            table.add_row(name, _told(error))
    return table


def _fused(weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam(weights)  # type: ignore[no-any-return]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:60]


def machine(device: torch.device) -> str:
    if device.type != "cuda":
        return f"cpu, torch {torch.__version__}"
    import deepspeed
    from deepspeed.ops.op_builder import FusedAdamBuilder

    properties = torch.cuda.get_device_properties(device)
    attention = [name for name in ("flash", "mem_efficient", "cudnn") if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
    return (
        f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"DeepSpeed {deepspeed.__version__}, SDPA may use {', '.join(attention)}, "
        f"DeepSpeed's FusedAdam {'can' if FusedAdamBuilder().is_compatible(verbose=False) else 'cannot'} be built"
    )


def main(
    size: Annotated[list[str], typer.Option(help="0.7M, 34M or 400M; may be given more than once")] = list(SIZES),  # noqa: B006
    entry: Annotated[list[str], typer.Option(help="one of the rows, by its name; may be given more than once")] = list(ENTRIES),  # noqa: B006
    steps: Annotated[int, typer.Option(help="steps that are timed, in three windows")] = 90,
    batch: Annotated[int, typer.Option(help="samples of a step")] = 64,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script")] = "cuda",
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device")
        return
    logging.disable(logging.WARNING)
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    console = Console(width=150)
    print(machine(place))
    with tempfile.TemporaryDirectory() as root:
        for each in size:
            console.print(table_of(each, place, steps, batch, {name: ENTRIES[name] for name in entry}, root))
    console.print(kernels(2**22 if device == "cpu" else 2**28, place, steps))
    leave()


if __name__ == "__main__":
    typer.run(main)
