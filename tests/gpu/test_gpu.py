"""What only a CUDA device shows: `pytest -m gpu`. On one card, without Ray and without a network."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gentrain.training.callbacks import MetricsFile
from gentrain.training.loop import train
from gentrain.training.world import World, join, leave
from tests.distributed.cases import records, run_of, values

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600), pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"name": "torch"},
    **{f"zero{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in range(4)},
}
BF16 = {name: {**engine, "precision": "bf16"} for name, engine in ENGINES.items() if name != "zero0"}


def curve(output: Path, engine: dict[str, Any], device: str = DEVICE, **training: Any) -> list[float]:
    """The losses of 12 steps of a small UNet on digits."""
    run = run_of(
        values(output, "flow_matching", engine, samples=144, micro_batches=1, **training)
        | {"data": "digits", "model": {"name": "unet", "channels": [16, 32], "norm_groups": 4}}
    )
    train(run, World(0, 1, torch.device(device)), lambda: False, [MetricsFile])
    return [line["loss/model"] for line in records(output)]


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    join()
    yield
    leave()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """`engine: torch` on the host."""
    return curve(tmp_path_factory.mktemp("host") / "run", ENGINES["torch"], "cpu")


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_gives_the_hosts_losses(name: str, reference: list[float], tmp_path: Path) -> None:
    """Noise and data are the same numbers, and TF32 is off by default: what is left is the order of sums (up to 3e-7 on the host)."""
    assert curve(tmp_path / "run", ENGINES[name]) == pytest.approx(reference, rel=1e-3)


@pytest.mark.parametrize("name", BF16)
def test_bf16_with_float32_masters_gives_about_the_hosts_losses(name: str, reference: list[float], tmp_path: Path) -> None:
    """On the host, bf16 losses differ by up to 4.8e-3 (autocast) and 2.3e-2 (bf16 weights): twice that."""
    assert curve(tmp_path / "run", BF16[name]) == pytest.approx(reference, rel=4.6e-2)


@pytest.mark.parametrize("key", ["compile", "recompute"])
def test_blocks_compiled_or_run_again_give_the_same_losses(key: str, reference: list[float], tmp_path: Path) -> None:
    assert curve(tmp_path / "run", ENGINES["torch"], **{key: True}) == pytest.approx(reference, rel=2e-3)


def test_recomputing_keeps_less(tmp_path: Path) -> None:
    peaks = []
    for recompute in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        curve(tmp_path / str(recompute), ENGINES["torch"], recompute=recompute)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]


def test_a_memory_snapshot_is_written(tmp_path: Path) -> None:
    curve(tmp_path / "run", ENGINES["torch"], profile={"skip": 1, "steps": 1, "memory": True})
    assert (tmp_path / "run/profile/rank-0-memory.pickle").stat().st_size > 1000


def deepspeed_fused(parameters: list[torch.nn.Parameter], **rule: Any) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import FusedAdam
    from deepspeed.ops.op_builder import FusedAdamBuilder

    if not FusedAdamBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's FusedAdam cannot be built")
    return FusedAdam(parameters, **rule)


@pytest.mark.parametrize("fused", [partial(torch.optim.AdamW, fused=True), deepspeed_fused], ids=["torch", "deepspeed"])
def test_fused_steps_are_those_of_the_reference(fused: Any) -> None:
    """AdamW's fused kernels against the loop over single operations."""
    start, gradients = torch.randn(1000, device=DEVICE), torch.randn(10, 1000, device=DEVICE)
    found = []
    for make in (partial(torch.optim.AdamW, foreach=False), fused):
        p = torch.nn.Parameter(start.clone())
        optimizer = make([p], lr=0.01, weight_decay=0.1)
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
        found.append(p.detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
