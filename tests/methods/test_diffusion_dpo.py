import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import logsigmoid

from gentrain.config import ConfigError, Document
from gentrain.data.preferences import Preferences
from gentrain.methods.diffusion_dpo import DiffusionDPO, dpo_loss
from gentrain.paths.times import LogNormal
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.training.run import parse_run
from tests.methods.test_ddo import nets
from tests.methods.toy import batch_of, noise_of


def test_the_loss_is_the_papers() -> None:
    a, b = torch.tensor([0.3, -2.0, 1e4], dtype=torch.float64), torch.tensor([0.1, 1.0, -1e4], dtype=torch.float64)
    assert dpo_loss(a, b, 0.7).item() == pytest.approx(-logsigmoid(0.7 * (a - b)).mean().item())
    assert dpo_loss(b.float(), a.float(), 1.0).isfinite()


def test_the_optimum_is_the_reference_tilted_by_the_reward() -> None:
    """With preferences drawn by Bradley and Terry's law the best model is p_ref exp(reward / beta) / Z (arXiv:2305.18290, eq. 4)."""
    generator = torch.Generator().manual_seed(0)
    reward, reference = torch.randn(4, generator=generator).double(), torch.randn(4, generator=generator).double().log_softmax(0)
    beta, logits = 0.5, torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")
    i, j = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    chance = (reward[i] - reward[j]).sigmoid()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        ratio = logits.log_softmax(0) - reference
        loss = sum((c * dpo_loss(ratio[a : a + 1], ratio[b : b + 1], beta) for a, b, c in zip(i, j, chance, strict=True)), logits.sum() * 0)
        loss.backward()
        return loss

    optimizer.step(closure)
    tilted = (reference + reward / beta).softmax(0)
    assert (logits.detach().softmax(0) - tilted).abs().max() < 1e-6


def pairs_of(count: int) -> dict[str, torch.Tensor]:
    batch = batch_of(count)
    return batch | {"rejected/x": batch_of(count, 1000)["x"], "rejected/label": batch["label"]}


def test_both_samples_meet_the_same_time_noise_and_label() -> None:
    group = nets(VarianceExploding(), "edm")
    method, pairs = DiffusionDPO(times=LogNormal(), label_dropout=0.5), pairs_of(64)
    same = method.loss(group, pairs | {"rejected/x": pairs["x"]}, noise_of(64))
    assert same.value.item() == pytest.approx(math.log(2), abs=1e-7)
    assert (same.logs["margin"], same.logs["preference_accuracy"]) == (0, 0.5)
    forward = method.loss(group, pairs, noise_of(64))
    back = method.loss(group, pairs | {"x": pairs["rejected/x"], "rejected/x": pairs["x"]}, noise_of(64))
    assert forward.logs["margin"].item() == pytest.approx(-back.logs["margin"].item(), rel=1e-5) != 0
    seen = group.model.network.seen
    assert torch.equal(seen[0], seen[1]) and 0 < (seen[0] < 0).sum() < 64
    forward.value.backward()
    assert all(parameter.grad is None for parameter in group.reference.network.parameters())
    assert all(parameter.grad is not None for parameter in group.model.network.parameters())


def test_the_model_learns_what_is_preferred() -> None:
    group = nets(VarianceExploding(), "edm", same=True)
    optimizer = torch.optim.Adam(group.model.network.parameters(), lr=1e-3)
    method, losses, accuracy = DiffusionDPO(times=LogNormal(), beta=1.0), [], []
    for step in range(60):
        pairs = batch_of(128, 128 * step)
        preferred = pairs["x"] + torch.tensor([0.6, 0.0])
        found = method.loss(
            group, pairs | {"x": preferred, "rejected/x": pairs["x"], "rejected/label": pairs["label"]}, noise_of(128, step)
        )
        optimizer.zero_grad()
        found.value.backward()
        optimizer.step()
        losses.append(found.value.item())
        accuracy.append(found.logs["preference_accuracy"].item())
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert sum(losses[-10:]) / 10 < 0.67 and sum(accuracy[-10:]) / 10 > 0.6


def pairs_file(tmp_path: Path, **changes: Any) -> str:
    tensors = {
        "preferred": torch.arange(20.0).reshape(10, 2),
        "rejected": -torch.arange(20.0).reshape(10, 2),
        "label": torch.arange(10) % 3,
    }
    save_file({name: value for name, value in (tensors | changes).items() if value is not None}, tmp_path / "pairs.safetensors")
    return str(tmp_path / "pairs.safetensors")


def test_pairs_are_read_row_by_row(tmp_path: Path) -> None:
    data = Preferences(file=pairs_file(tmp_path), classes=["a", "b", "c"], held_out=3)
    train, held_out = data.split("train"), data.split("held_out")
    assert (data.shape, len(train), len(held_out)) == ((2,), 7, 3)
    row = train[4]
    assert torch.equal(row["x"], -row["rejected/x"]) and row["label"] == row["rejected/label"] == 1
    assert torch.equal(held_out[0]["x"], torch.tensor([14.0, 15.0]))
    assert Preferences(file=pairs_file(tmp_path, label=None), held_out=1).split("train")[0]["label"] == -1


@pytest.mark.parametrize(
    "changes, settings, message",
    [
        ({"rejected": torch.zeros(9, 2)}, {}, "of one shape"),
        ({"rejected": None}, {}, "of one shape"),
        ({"label": torch.full((10,), 3)}, {}, "below 3"),
        ({}, {"held_out": 10}, "lower held_out"),
        ({"preferred": None}, {}, "holds no pairs"),
    ],
)
def test_files_that_hold_no_pairs_are_refused(tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    data = Preferences(**{"file": pairs_file(tmp_path, **changes), "classes": ["a", "b", "c"], "held_out": 2, **settings})
    with pytest.raises(ValueError, match=message):
        data.split("train")


def test_data_without_pairs_are_refused() -> None:
    settings = {
        "method": "diffusion_dpo", "data": "spiral", "model": "mlp", "training": {"samples": 64},
        "roles": {"reference": {"weights": "runs/edm"}},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="take the data set preferences"):
        parse_run(Document(settings, "test"))
