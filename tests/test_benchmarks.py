"""Benchmarks, each called at a tiny size on the CPU: the first machine that runs one in earnest shall not find it broken."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gentrain.training.optimizers import Optimizer
from gentrain.training.world import join, leave

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def group() -> Iterator[None]:
    join()
    yield
    leave()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_cuda_device_the_benchmark_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark("gpu").main() is None
    assert capsys.readouterr().out == "no CUDA device\n"


@pytest.mark.timeout(240)
def test_the_benchmark_of_a_gpu_fills_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: None) -> None:
    """All engines against the loop by hand; compiling takes minutes and is left out."""
    gpu, cpu = benchmark("gpu"), torch.device("cpu")
    monkeypatch.setattr(gpu, "WARM_UP", 4)
    monkeypatch.setitem(gpu.SIZES, "tiny", ["model.channels=[8,16]", "model.norm_groups=4", "model.attention=[]"])
    entries = {name: entry for name, entry in gpu.ENTRIES.items() if "compiled" not in name}
    table = gpu.table_of("tiny", cpu, 3, 4, entries, str(tmp_path))
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert [row[0] for row in rows] == list(entries)
    for name, steps, hand, ratio, peak, hand_peak, planned, losses in rows:
        assert float(steps) > 0 and float(hand) > 0, (name, steps)
        assert float(ratio) == pytest.approx(float(hand) / float(steps), rel=0.05)
        assert (peak, hand_peak) == ("0.00", "0.00") and float(planned) >= 0
        assert len(losses.split()) == 3 and all(0.3 < float(loss) < 4 for loss in losses.split())
    first, *others = [[float(loss) for loss in row[7].split()] for row in rows]
    assert all(each == pytest.approx(first, abs=0.05) for each in others)  # every engine starts alike, in bf16 too
    assert gpu.machine(cpu).startswith("cpu, torch ")
    steps = dict(zip(*(list(column.cells) for column in gpu.kernels(640, cpu, 3).columns), strict=True))
    assert list(steps) == ["torch, loops", "torch, foreach", "torch, fused"] and all(float(value) > 0 for value in steps.values())


def test_an_entry_that_fails_is_told_of_in_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: None) -> None:
    gpu = benchmark("gpu")
    monkeypatch.setattr(gpu, "WARM_UP", 1)
    monkeypatch.setitem(gpu.SIZES, "tiny", ["model.channels=[8]", "model.norm_groups=4", "model.attention=[]"])
    monkeypatch.setattr(gpu, "measured", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory\nmore")))
    table = gpu.table_of("tiny", torch.device("cpu"), 3, 4, {"torch fp32": []}, str(tmp_path))
    assert [next(iter(column.cells)) for column in table.columns][:2] == ["torch fp32", "RuntimeError: out of memory"]


def test_the_benchmark_of_the_loader_reads_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: None) -> None:
    loader = benchmark("loader")
    for name, value in {"SIDE": 24, "SIZE": 8, "BATCH": 4}.items():
        monkeypatch.setattr(loader, name, value)
    for number, (name, data) in enumerate(loader.written(tmp_path, 40).items()):
        assert loader.speed(data, 0) > 0, name
        if number == 0:
            assert 0 <= loader.waits(data, 0, tmp_path / "run") < 1


def test_imports_are_summed_by_library() -> None:
    told = (
        "import time:       100 |        300 |   torch.nn\nimport time:  50 | 50 | torch\nother\nimport time:   7 | 7 |     json.decoder\n"
    )
    assert benchmark("startup").imports(told) == {"torch": 150e-6, "json": 7e-6}


def test_samplers_are_counted_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = benchmark("sampling")
    for name, value in {"STEPS": 2, "COUNT": 50, "SEEDS": 2}.items():
        monkeypatch.setattr(sampling, name, value)
    network, denoiser = sampling.trained()
    for name, calls in (("euler", 8), ("heun", 7), ("restart", 63)):
        counted, distances = sampling.measured(sampling.SAMPLERS[name](64 if name == "restart" else 8), network, denoiser)
        assert counted == calls and len(distances) == 2 and all(map(math.isfinite, distances))


def test_every_optimiser_may_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers = benchmark("optimizers")
    monkeypatch.setattr(optimizers, "HELD_OUT", 256)
    for name, kind in Optimizer.available().items():
        chosen, found = optimizers.best_lr(kind(**optimizers.SETTINGS.get(name, {})), 4)
        assert math.isfinite(found.loss) and isinstance(chosen, kind)
    monkeypatch.setattr(optimizers, "DRAWN", 50)
    assert 0 < optimizers.distance(found.denoiser, 0) < 10


def test_the_frontier_is_drawn_from_the_scores_of_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frontier = benchmark("frontier")

    def metric(name: str, value: float, better: str) -> dict[str, Any]:
        return {"name": name, "value": value, "low": value - 0.02, "high": value + 0.01, "better": better, "definition": "of a test"}

    values = {"teacher; w = 1": (0.8, 4.0), "SiD; w = 2": (0.98, 7.0), "SiD; w = 1.5": (0.95, 4.5), "told no guidance": (0.5, 50.0)}
    metrics = [metric(f"Frechet distance, {name}", d, "lower") for name, (_, d) in values.items()]
    metrics += [metric(f"class accuracy, {name}", a, "higher") for name, (a, _) in values.items()]
    lines = frontier.points_of(metrics)
    assert {name: [(w, a["value"], d["value"]) for w, a, d in points] for name, points in lines.items()} == {
        "teacher": [(1, 0.8, 4.0)], "SiD": [(1.5, 0.95, 4.5), (2, 0.98, 7.0)],
    }  # fmt: skip
    with pytest.raises(SystemExit, match="has no scores yet"):
        frontier.main(tmp_path, tmp_path / "out.svg")
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "metrics.json").write_text(json.dumps({"metrics": metrics}))
    frontier.main(tmp_path, tmp_path / "out.svg")
    printed = capsys.readouterr().out.splitlines()
    assert printed[2:] == [
        "| teacher | 1 | 0.800 (0.780 to 0.810) | 4.0 (4.0 to 4.0) |",
        "| SiD | 1.5 | 0.950 (0.930 to 0.960) | 4.5 (4.5 to 4.5) |",
        "| SiD | 2 | 0.980 (0.960 to 0.990) | 7.0 (7.0 to 7.0) |",
    ]
    assert (tmp_path / "out.svg").read_text().count("<!-- SiD -->") == 1  # in the legend
    first = (tmp_path / "out.svg").read_bytes()
    frontier.main(tmp_path, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == first
    (tmp_path / "scores" / "metrics.json").write_text(json.dumps({"metrics": metrics[3:4]}))
    with pytest.raises(SystemExit, match="tells of no samples"):
        frontier.main(tmp_path, tmp_path / "out.svg")
