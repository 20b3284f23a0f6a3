"""Contrastive training: every ZeRO stage trains the towers of one process, with negatives of both ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gentrain.training.world import World
from tests.distributed.cases import Job, difference, record_difference, records, state_of, train_all
from tests.distributed.test_contrastive import run_settings, train_towers
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gate, pytest.mark.timeout(3600)]

STAGES = (0, 1, 2, 3)
EXCHANGES = ("two_way_ring", "ring", "gather")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    jobs = []
    for stage in STAGES:
        engine = {"name": "deepspeed", "zero_stage": stage}
        jobs += [Job(run_settings(root, f"{stage}-{exchange}", engine, exchange=exchange)) for exchange in EXCHANGES]
        in_pieces = run_settings(root, f"{stage}-pieces", engine)
        in_pieces["model"] = {**in_pieces["model"], "rows_at_once": 4}
        jobs.append(Job(in_pieces))
    assert run_ranks(2, train_towers, jobs) == [[("finished", "")] * len(jobs)] * 2
    assert train_all(World(0, 1, torch.device("cpu")), [Job(run_settings(root, "alone", "torch"))]) == [("finished", "")]
    return root


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", [*EXCHANGES, "pieces"])
def test_two_ranks_train_the_towers_of_one(root: Path, stage: int, way: str) -> None:
    """Measured largest differences are printed; top1 is logged among the rank's own texts, so that it alone differs."""
    one, two = ([{k: v for k, v in line.items() if k != "top1"} for line in records(root / name)] for name in ("alone", f"{stage}-{way}"))
    curve, weights = record_difference(one, two), difference(state_of(root / "alone"), state_of(root / f"{stage}-{way}"))
    print(f"ZeRO {stage}, {way}: metrics {curve:.1e}, weights {weights:.1e}")
    assert len(one) == 6
    assert curve <= 1e-5 and weights <= 1e-4
