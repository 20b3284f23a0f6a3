"""Blocks that run again in the backward, or are compiled; the profiler."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gentrain.config import ConfigError
from gentrain.training.blocks import blocks_of, compile_blocks, recompute
from gentrain.training.callbacks import MetricsFile
from gentrain.training.loop import train
from gentrain.training.memory import memory_of
from gentrain.training.profiler import Profiler
from gentrain.training.roles import build_network
from gentrain.training.world import World
from tests.distributed.cases import difference, records, run_of, state_of, values

ALONE = World(0, 1, torch.device("cpu"))
UNET = {"model": {"name": "unet", "channels": [8, 16], "attention": []}, "data": "digits"}


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Module()
        self.inside.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.5)) for _ in range(6))
        self.calls = [0] * 6
        for place, block in enumerate(self.inside.blocks):
            block.register_forward_pre_hook(lambda *_, place=place: self.calls.__setitem__(place, self.calls[place] + 1))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.inside.blocks:
            x = block(x)
        return x


def kept_bytes(network: nn.Module, x: Tensor) -> tuple[int, Tensor]:
    sizes = []
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        loss = network(x).square().sum()
    return sum(sizes), loss


def test_blocks_run_again_with_the_same_dropout_and_keep_less() -> None:
    plain, saving, x = Blocks(), Blocks(), torch.randn(512, 64)
    recompute(saving)
    assert saving.state_dict().keys() == plain.state_dict().keys()
    (more, a), (less, b) = (kept_bytes(network, x) for network in (plain, saving))
    assert torch.equal(a, b) and less == 7 * x.nbytes < 0.4 * more  # the inputs of six blocks, and what the loss squares
    a.backward()
    torch.manual_seed(7)  # what is drawn meanwhile changes nothing
    b.backward()
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)


@pytest.mark.parametrize("model, count", [({"name": "unet", "channels": [8, 16], "attention": []}, 6), ({"name": "dit", "layers": 3}, 3)])
def test_the_blocks_of_networks_are_found(model: dict[str, Any], count: int) -> None:
    run = run_of(values(Path("unused"), "flow_matching") | {"data": "digits", "model": model})
    assert len(list(blocks_of(build_network(run, "model")))) == count


def trained(output: Path, engine: Any = "torch", **training: Any) -> None:
    run = run_of(values(output, "flow_matching", engine, **training) | UNET)
    train(run, ALONE, lambda: False, [MetricsFile, Profiler])


def test_a_run_is_the_same_with_blocks_that_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path / "plain")
    ran: list[int] = []
    real = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("gentrain.training.blocks.checkpoint", lambda *a, **k: ran.append(1) or real(*a, **k))
    trained(tmp_path / "saving", recompute=True)
    assert len(ran) == 6 * 12  # blocks x micro-batches
    assert difference(state_of(tmp_path / "plain"), state_of(tmp_path / "saving")) < 1e-5


def test_a_plan_knows_that_less_is_kept() -> None:
    plain, saving = (memory_of(run_of(values(Path("unused"), "flow_matching", recompute=each) | UNET)) for each in (False, True))
    assert saving.peak < plain.peak


def test_each_block_of_every_network_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a backend that changes nothing, so that no compiler is needed."""
    compiled: list[dict[str, Any]] = []
    real = nn.Module.compile

    def compile_(module: nn.Module, **options: Any) -> None:
        compiled.append(options)
        real(module, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compile_)
    trained(tmp_path / "plain")
    assert not compiled
    trained(tmp_path / "compiled", compile=True)
    assert compiled == [{"dynamic": False}] * 6
    assert difference(state_of(tmp_path / "plain"), state_of(tmp_path / "compiled")) < 1e-4
    network = Blocks()
    names = network.state_dict().keys()
    compile_blocks(network)
    assert network.state_dict().keys() == names


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "mean_flow", "model": "mlp", "training": {"recompute": True}}, r"training\.recompute: derivatives in forward mode"),
    ({"engine": {"name": "deepspeed", "zero_stage": 1}, "training": {"compile": True}}, r"training\.compile: it goes with engine: torch"),
    ({"adapter": {"rank": 2}, "training": {"recompute": True}}, r"training\.recompute: it would lose what a role learns"),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_what_would_go_wrong_is_refused(changes: dict[str, Any], message: str) -> None:
    given = values(Path("unused"), "flow_matching") | UNET
    with pytest.raises(ConfigError, match=message):
        run_of(given | changes | {"training": given["training"] | changes["training"]})


@pytest.mark.parametrize("skip, steps, seen", [(2, 2, 2), (0, 1, 1), (4, 100, 2)])
def test_the_profiler_looks_at_the_steps_it_was_told_to(skip: int, steps: int, seen: int, tmp_path: Path) -> None:
    trained(tmp_path, profile={"skip": skip, "steps": steps, "memory": True})
    with gzip.open(tmp_path / "profile/rank-0.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    stepped = [event for event in events if "Optimizer.step" in str(event.get("name"))]
    assert len(stepped) == seen and "aten::convolution" in (tmp_path / "profile/rank-0.txt").read_text()


def test_without_it_nothing_is_written_and_the_numbers_are_the_same(tmp_path: Path) -> None:
    trained(tmp_path / "plain")
    trained(tmp_path / "seen", profile={"skip": 1})
    assert not (tmp_path / "plain/profile").exists() and records(tmp_path / "plain") == records(tmp_path / "seen")
