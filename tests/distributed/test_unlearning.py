"""Methods that forget, on two ranks, and resumed in the middle of their alternation of roles."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gentrain.methods.saliency_unlearn import MASK
from gentrain.training.roles import build_network
from gentrain.training.run import save_config
from tests.distributed.cases import Job, difference, run_of, state_of, values
from tests.distributed.three_ways import (
    assert_a_resumed_run_is_the_uninterrupted_one,
    assert_two_ranks_give_the_curve_of_one,
    train_three_ways,
)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(480)]

METHODS: dict[str, dict[str, Any]] = {
    "sfd": {"name": "sfd", "forget": 1, "override": 2, "lam": 0.5, "mu": 0.5},
    "esd": {"name": "esd", "forget": 1},
    "npo": {"name": "npo", "forget": 1},
    "gradient_ascent": {"name": "gradient_ascent", "forget": 1},
    "saliency_unlearn": {"name": "saliency_unlearn", "forget": 1, "override": 2, "saliency": ""},
}
STARTS = {"sfd": "teacher", "gradient_ascent": "model"}  # the role that takes the teacher's weights, where it is not called original


MODEL: dict[str, Any] = {"model": {"name": "dropout_mlp", "dropout": 0}}


def settings_of(root: Path, name: str, method: str, engine: Any) -> dict[str, Any]:
    """Of a run in root/name-method, which begins from root/teacher; see `prepare`."""
    given = values(root / f"{name}-{method}", METHODS[method], engine) | MODEL
    if method == "saliency_unlearn":
        given["method"] = {**METHODS[method], "saliency": str(root / "mask")}
        given["optimizer"] = {"name": "adamw", "lr": 0.01}  # weight decay would move what does not learn
    return given | {"roles": {STARTS.get(method, "original"): {"weights": str(root / "teacher")}}}


def prepare(root: Path) -> Job:
    """Writes a mask; returns what trains the teacher, that is made to forget."""
    teacher = values(root / "teacher", "flow_matching") | MODEL
    save_config(run_of(teacher))  # what a run's weights are read by
    (root / "mask").mkdir()
    network, generator = build_network(run_of(teacher), "model"), torch.Generator().manual_seed(0)
    mask = {name: torch.randint(2, p.shape, generator=generator, dtype=torch.uint8) for name, p in network.named_parameters()}
    save_file(mask, root / "mask" / MASK)
    return Job(teacher)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    assert train_three_ways(partial(settings_of, root), METHODS, [prepare(root)], trace=True) == [("finished", "")]
    return root


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_give_the_curve_of_one(root: Path, method: str) -> None:
    assert_two_ranks_give_the_curve_of_one(root, method, 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(root: Path, method: str) -> None:
    assert_a_resumed_run_is_the_uninterrupted_one(root, method)


def test_only_the_roles_that_learn_move(root: Path) -> None:
    """Bit for bit, in a whole run: the teacher stays, the two others leave it."""
    trace = torch.load(root / "alone-sfd" / "trace.pt")
    assert not trace["leaked"]
    for role in ("fake_score", "student"):
        assert difference(trace["weights"][0][role], trace["weights"][-1][role]) > 1e-3
    assert difference(trace["weights"][0]["fake_score"], trace["weights"][0]["student"]) == 0


def test_weights_outside_the_mask_stay_on_two_ranks(root: Path) -> None:
    """Bit for bit, through the shards of ZeRO 2 and a resume; those inside move, but for the ones that get no gradient."""
    mask, before = load_file(root / "mask" / MASK), state_of(root / "teacher")
    for kind in ("whole", "halves"):
        after = state_of(root / f"{kind}-saliency_unlearn")
        for name, learns in mask.items():
            start, end = before[f"model.ema/{name}"], after[f"model.weights/{name}"]
            assert torch.equal(end[learns == 0], start[learns == 0])
            if name not in ("unused", "labels.weight"):
                assert (end != start)[learns == 1].all()
