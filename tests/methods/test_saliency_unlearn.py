"""saliency_unlearn: which weights are salient, what the class is relabelled as, and that the others stay, bit for bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gentrain.cluster.launch import launch
from gentrain.config import ConfigError, Document
from gentrain.data.toys import Rings
from gentrain.methods.base import Clock
from gentrain.methods.saliency_unlearn import MASK, SaliencyUnlearning, salient
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.recipes.saliency import Saliency
from gentrain.training.learning import hold_the_rest
from gentrain.training.roles import build_network, load_weights
from gentrain.training.run import RunConfig, parse_run
from tests.methods.toy import TinyNetwork, batch_of, noise_of

PATH = RectifiedFlow()


def made(**settings: Any) -> SaliencyUnlearning:
    method = SaliencyUnlearning(forget=1, saliency="none", **settings)
    method.check_data(Rings())
    return method


def test_the_largest_magnitudes_are_salient_whichever_tensor_they_are_in() -> None:
    gradients = {"a": torch.tensor([[-5.0, 0.1], [0.3, 0.2]]), "b": torch.tensor([0.4, -0.01])}
    assert {name: mask.tolist() for name, mask in salient(gradients, 0.5).items()} == {
        "a": [[True, False], [True, False]],
        "b": [True, False],
    }
    assert sum(int(mask.sum()) for mask in salient(gradients, 0.01).values()) == 1
    assert all(mask.all() for mask in salient(gradients, 1.0).values())


def network(x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
    """Velocity: the label, everywhere."""
    assert condition is not None
    return condition["label"].double()[:, None].expand_as(x)


def by_hand(noise: Any, batch: dict[str, Tensor], override: int, weight: float) -> float:
    """The model's velocity is the label plus 1, the original's the label: rows of class 1 miss the override's by 2 - override."""
    noise.uniform((len(batch["x"]),))
    eps = noise.normal(tuple(batch["x"].shape))
    target = (eps - batch["x"]).double()  # of the rectified flow
    total = 0.0
    for row, label in enumerate(batch["label"].tolist()):
        if label == 1:
            total += weight * (2.0 - override) ** 2
        else:
            total += ((label + 1 - target[row]) ** 2).mean().item()
    return total / len(batch["x"])


@pytest.mark.parametrize("override, weight", [(2, 1.0), (0, 0.25)])
def test_the_class_is_taught_what_the_original_says_of_another(override: int, weight: float) -> None:
    nets = SimpleNamespace(
        original=Denoiser(network, PATH, "velocity"), model=Denoiser(lambda x, t, c: network(x, t, c) + 1, PATH, "velocity")
    )
    batch = batch_of(30)
    loss = made(override=override, weight=weight).loss(nets, batch, noise_of(30))  # type: ignore[arg-type]
    assert loss.value.item() == pytest.approx(by_hand(noise_of(30), batch, override, weight), rel=1e-6)
    assert loss.logs["error_forgotten"].item() == pytest.approx((2.0 - override) ** 2 / 3, rel=1e-6)


def test_uniform_draws_the_other_classes() -> None:
    asked: list[Tensor] = []

    def original(x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        assert condition is not None
        asked.append(condition["label"])
        return torch.zeros_like(x)

    batch = batch_of(300)
    nets = SimpleNamespace(original=Denoiser(original, PATH, "velocity"), model=Denoiser(TinyNetwork(), PATH, "velocity"))
    made().loss(nets, batch, noise_of(300))  # type: ignore[arg-type]
    rows = batch["label"] == 1
    assert set(asked[0][rows].tolist()) == {0, 2} and torch.equal(asked[0][~rows], batch["label"][~rows])
    assert 30 < (asked[0][rows] == 0).sum() < 70


def test_gradients_reach_the_model_only() -> None:
    nets = SimpleNamespace(original=Denoiser(TinyNetwork(), PATH, "velocity"), model=Denoiser(TinyNetwork(), PATH, "velocity"))
    (update,) = made().updates(Clock(0, 8, 80))
    assert update.role == SaliencyUnlearning.generator == "model"
    update.losses[0](nets, batch_of(9), noise_of(9)).value.backward()  # type: ignore[arg-type]
    assert all(p.grad is None for p in nets.original.network.parameters())
    assert all(p.grad is not None for p in nets.model.network.parameters())


# --- a whole run --------------------------------------------------------------------------------------------------------


def run_of(output: Path, method: Any, **more: Any) -> RunConfig:
    settings = {
        "method": method, "data": "digits", "model": {"name": "unet", "channels": [8, 8], "attention": []}, "engine": "torch",
        "training": {"samples": 96, "batch_size": 16}, "optimizer": {"name": "adamw", "lr": 0.01}, "output": str(output),
    }  # fmt: skip
    return parse_run(Document(settings | more, "test"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saliency")
    launch(run_of(root / "original", "flow_matching"))
    Saliency(str(root / "original"), 3, share=0.3, count=40).execute(root / "mask")
    return root


def unlearning(root: Path, name: str, mask: str = "mask", **more: Any) -> RunConfig:
    method = {"name": "saliency_unlearn", "forget": 3, "saliency": str(root / mask)}
    return run_of(root / name, method, roles={"original": {"weights": str(root / "original")}}, **more)


def test_only_the_salient_weights_move(root: Path) -> None:
    mask = {key: value.bool() for key, value in load_file(root / "mask" / MASK).items()}
    learning, weights = (sum(count) for count in zip(*((int(value.sum()), value.numel()) for value in mask.values()), strict=True))
    assert learning == pytest.approx(0.3 * weights, abs=2)
    launch(unlearning(root, "unlearned"))
    before, after = load_weights(str(root / "original")), load_weights(str(root / "unlearned"))
    for key, value in mask.items():
        assert torch.equal(after[key][~value], before[key][~value])
    assert sum(int((after[key] != before[key])[value].sum()) for key, value in mask.items()) > 0.9 * learning


def test_the_mask_is_of_the_class_that_is_forgotten(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the label embedding only the row of the class has gradients, of which none reach the null class."""
    found: list[dict[str, Tensor]] = []

    def watched(gradients: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        found.append(gradients)
        return salient(gradients, share)

    monkeypatch.setattr("gentrain.recipes.saliency.salient", watched)
    Saliency(str(root / "original"), 3, share=1.0, count=40).execute(tmp_path)
    assert all(value.all() for value in load_file(tmp_path / MASK).values())
    (embedding,) = (value for key, value in found[0].items() if "class_embedding" in key and len(value) == 11)
    assert embedding.abs().sum(1).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(
    "more, said",
    [
        ({"optimizer": {"name": "adamw", "weight_decay": 0.1}}, "optimizer: weights that do not learn would move; take adamw or sgd"),
        ({"engine": {"name": "deepspeed", "zero_stage": 3}}, "engine.zero_stage: which weights learn is not kept by ZeRO stage 3"),
        ({"mask": "nowhere"}, "method.saliency: .*nowhere/mask.safetensors cannot be read .* run a stage `saliency` first"),
        ({"mask": "other"}, "method: which weights learn was found for another network than that of role 'model'"),
    ],
)
def test_what_would_move_other_weights_is_refused(root: Path, more: dict[str, Any], said: str) -> None:
    (root / "other").mkdir(exist_ok=True)
    save_file({"x": torch.ones(2, dtype=torch.uint8)}, root / "other" / MASK)
    run = unlearning(root, "refused", **more)
    with pytest.raises(ConfigError, match=said):
        hold_the_rest(run, "model", build_network(run, "model"))
