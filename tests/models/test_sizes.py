"""Pipelines of real sizes, from their public configurations alone: how many parameters, and what a plan says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks.sizes import flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from gentrain.config import register
from gentrain.data.prompts import Prompts
from gentrain.training.memory import memory_of
from gentrain.training.roles import count_parameters
from gentrain.training.run import RunConfig
from tests.distributed.cases import run_of

MIB = 2**20


@register("pictured_prompts")
@dataclass
class Pictured(Prompts):
    """As if there were an image to each."""

    blank: ClassVar[bool] = False  # type: ignore[misc]


def run(root: Path, make: Callable[[Path], None], **more: Any) -> RunConfig:
    if not (root / make.__name__).exists():
        make(root / make.__name__)
    (root / "prompts.txt").write_text("a rose\na cat\n")
    return run_of(
        {
            "model": {"name": "pretrained", "directory": str(root / make.__name__)},
            "method": "diffusion" if make in (stable_diffusion, stable_diffusion_xl) else "flow_matching",
            "data": {"name": "pictured_prompts", "path": str(root / "prompts.txt"), "size": 512},
            "training": {"samples": 8, "batch_size": 8},
            "cluster": {"place": "ray", "workers": 8},
            "output": str(root / "run"),
            **more,
        }
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sizes")


@pytest.mark.parametrize(
    ("make", "parameters", "attention", "with_feed_forward"),
    [
        (stable_diffusion, 859_520_964, 3_188_736, 5_984_256),
        (stable_diffusion_xl, 2_567_463_684, 23_224_320, 41_861_120),
        (stable_diffusion_3, 2_028_328_000, 9_388_032, 20_938_752),
        (flux, 11_901_408_320, 26_148_864, 65_372_160),
    ],
)
def test_parameters_of_published_sizes(
    root: Path, make: Callable[[Path], None], parameters: int, attention: int, with_feed_forward: int
) -> None:
    assert count_parameters(run(root, make), "model") == (parameters, parameters)
    for targets, learn in ((["attention"], attention), (["attention", "feed_forward"], with_feed_forward)):
        adapted = run(root, make, adapter={"rank": 16, "targets": targets})
        assert count_parameters(adapted, "model") == (parameters, learn)


def test_cross_attention_alone_is_a_twentieth_of_stable_diffusion(root: Path) -> None:
    whole, learn = count_parameters(run(root, stable_diffusion, trainable=r"attn2\.to_[kv]"), "model")
    # two matrices [width, 768] in each of 2, 2, 2 (down), 1 (middle) and 3, 3, 3 (up) blocks of 320, 640 and 1280 channels
    assert learn == 2 * 768 * (320 * (2 + 3) + 640 * (2 + 3) + 1280 * (2 + 1 + 3)) and 0.02 < learn / whole < 0.03


@pytest.mark.parametrize("make", [stable_diffusion_xl, stable_diffusion_3, flux])
def test_state_of_published_sizes(root: Path, make: Callable[[Path], None]) -> None:
    """8 processes at ZeRO 2 in bf16: whole, and an adapter of rank 16 on a network below in half precision."""
    engine = {"engine": {"name": "deepspeed", "zero_stage": 2, "precision": "bf16"}, "optimizer": {"name": "adamw", "lr": 1e-5}}
    whole, adapted = run(root, make, **engine), run(root, make, **engine, adapter={"rank": 16})
    for each, below in ((whole, 0), (adapted, 1)):
        parts = {part.name: part for part in memory_of(each).parts}
        total, learn = count_parameters(each, "model")
        model = parts["model"]
        assert model.held is not None and model.activations is not None and model.activations.assumed == ""
        # weights in half precision, masters, moments and average in float32, shared out over the processes
        assert model.held.weights + model.held.optimizer + model.held.average == pytest.approx(2 * learn + 16 * learn / 8, rel=0.01)
        assert sum(part.weights for name, part in parts.items() if name.startswith("below")) == 2 * total * below
        codec = {name: sum(4 * p.numel() for p in each.parameters()) for name, each in whole.codec().skeletons().items()}
        assert {name: parts[name].weights for name in codec} == codec and len(codec) == {flux: 3, stable_diffusion_3: 4}.get(make, 3)


@pytest.mark.parametrize("offload", [False, True])
def test_a_plan_of_the_size_of_stable_diffusion(root: Path, offload: bool) -> None:
    """8 processes at ZeRO 2 in bf16, one image of 512 x 512 pixels each."""
    engine = {"name": "deepspeed", "zero_stage": 2, "precision": "bf16", "offload_optimizer": offload}
    memory = memory_of(run(root, stable_diffusion, engine=engine, optimizer={"name": "adamw", "lr": 1e-5}))
    parts, count = {part.name: part for part in memory.parts}, 859_520_964
    model = parts["model"]
    assert model.held is not None and model.activations is not None and model.activations.assumed == ""
    share = 4 * count / 8  # of float32, on each process
    masters = 0 if offload else share
    assert model.held.weights == pytest.approx(2 * count + masters, rel=0.01)
    assert model.held.optimizer == pytest.approx(2 * share, rel=0.01)
    assert parts["vae"].weights == 4 * 83_653_863 and parts["text_encoder"].weights == 4 * 123_060_480
    # on the device weights, masters, moments and average, autoencoder and text encoder
    assert memory.resting == pytest.approx(2 * count + 4 * masters + 4 * (83_653_863 + 123_060_480) + model.held.buffers, rel=0.03)
    # on the host masters, their gradients, moments and average in float32, and what is to become bf16 weights
    assert memory.host == (pytest.approx(5 * share + share / 2, rel=0.03) if offload else 0)
    assert 800 * MIB < model.activations.saved < 1000 * MIB
