"""The engine's contract where one process and plain torch suffice; tests/distributed holds the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gentrain.training.engine import EngineMisuse, RoleEngine, frozen
from gentrain.training.storage import LocalStorage
from gentrain.training.world import World
from tests.distributed.cases import misuses, run_of, values
from tests.reliability.publishing import publish

ALONE = World(0, 1, torch.device("cpu"))


def _engine(**options: object) -> RoleEngine:
    run = run_of(values(Path("unused"), "flow_matching", {"name": "torch", **options}))
    torch.manual_seed(0)
    return run.engine.build("model", run.model.build((2,), 3), run.optimizer, ALONE)


def _state(engine: RoleEngine) -> dict[str, dict[str, torch.Tensor]]:
    return {kind: {name: piece.values.clone().reshape(piece.shape) for name, piece in shard.items()} for kind, shard in engine.shards()}


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 2), torch.rand(4)


def test_misuse_of_the_reference_raises() -> None:
    said = misuses(ALONE, "torch")
    assert all(said.values())


@pytest.mark.parametrize("clipping", [None, 0.01])
def test_the_norm_is_that_before_clipping(batch: tuple[torch.Tensor, torch.Tensor], clipping: float | None) -> None:
    engine = _engine(gradient_clipping=clipping)
    engine.module.eval()
    engine.backward(engine(*batch).square().mean(), last=True)
    gradients = [p.grad.clone() for p in engine.module.parameters() if p.grad is not None]
    expected = torch.cat([g.flatten() for g in gradients]).norm().item()
    steps: list[float] = []
    engine.optimizer.step = lambda: steps.append(nn.utils.get_total_norm([p.grad for p in engine.module.parameters()]).item())  # type: ignore[method-assign, assignment, misc]
    result = engine.step(0.1)
    assert result.applied and result.grad_norm == pytest.approx(expected, rel=1e-5)
    assert steps == [pytest.approx(clipping or expected, rel=1e-3)]
    assert all(p.grad is None for p in engine.module.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(batch: tuple[torch.Tensor, torch.Tensor], value: float) -> None:
    engine = _engine()
    before = engine.weights()
    engine.backward(engine(*batch).mean() * value, last=True)
    result = engine.step(0.1)
    assert not result.applied
    assert all(torch.equal(v, before[k]) for k, v in engine.weights().items())
    assert not _state(engine)["optimizer"]
    engine.backward(engine(*batch).mean(), last=True)
    assert engine.step(0.1).applied


def test_gradients_pass_through_to_the_input_but_not_into_the_weights(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    engine = _engine()
    x, t = batch[0].requires_grad_(), batch[1]
    with frozen(engine.module):
        engine.through(x, t).square().mean().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    assert all(p.grad is None and p.requires_grad for p in engine.module.parameters())


def test_frozen_switches_dropout_off_and_puts_everything_back() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    module[0].bias.requires_grad_(False)
    with frozen(module):
        assert not module[1].training and not any(p.requires_grad for p in module.parameters())
    assert module[1].training and module[0].weight.requires_grad and not module[0].bias.requires_grad
    with pytest.raises(ZeroDivisionError), frozen(module):
        raise ZeroDivisionError
    assert module[0].weight.requires_grad


def test_bf16_of_the_reference_is_autocast_with_float32_results(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    full, half = _engine(), _engine(precision="bf16")
    full.module.eval()
    half.module.eval()
    exact, rounded = full(*batch), half(*batch)
    assert rounded.dtype == torch.float32 and torch.equal(rounded, rounded.bfloat16().float())
    assert 0 < (exact - rounded).abs().max() < 0.03
    assert half.weights()["output.weight"].dtype == torch.float32


def _trained(batch: tuple[torch.Tensor, torch.Tensor]) -> RoleEngine:
    engine = _engine()
    engine.start_ema()
    for _ in range(3):
        engine.backward(engine(*batch).square().mean(), last=True)
        engine.step(0.1)
        engine.update_ema(0.5)
    return engine


def test_state_is_restored_into_another_engine(batch: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    engine, other = _trained(batch), _engine()
    engine.module.get_buffer("scale").fill_(0.5)
    storage = LocalStorage(tmp_path)
    name = publish(storage, 3, {f"model.{kind}": [shard] for kind, shard in engine.shards()})
    other.start_ema()
    with storage.open(name) as checkpoint:
        other.read(lambda kind: checkpoint.shards(f"model.{kind}"))
    other.refresh()
    ours, theirs = _state(engine), _state(other)
    assert list(ours) == list(theirs) == ["weights", "ema", "optimizer"]
    for kind in ours:
        assert ours[kind].keys() == theirs[kind].keys() and all(torch.equal(ours[kind][k], theirs[kind][k]) for k in ours[kind])
    assert theirs["optimizer"]["step"] == 3 and theirs["weights"]["scale"] == 0.5
    assert {"exp_avg/unused", "exp_avg_sq/unused"} <= theirs["optimizer"].keys()  # which no loss reaches
    for one in (engine, other):
        torch.manual_seed(0)  # of dropout
        one.backward(one(*batch).square().mean(), last=True)
        one.step(0.1)
    assert all(torch.equal(v, other.weights()[k]) for k, v in engine.weights().items())


def test_replicas_share_the_writing_and_every_element_is_written_once() -> None:
    run = run_of(values(Path("unused"), "flow_matching"))
    written: list[str] = []
    for rank in range(3):
        engine = run.engine.build("model", run.model.build((2,), 3), run.optimizer, World(rank, 3, torch.device("cpu")))
        weights = dict(engine.shards())["weights"]
        assert "scale" in weights
        written += [name for name in weights if name != "scale"]
    assert sorted(written) == sorted(engine.shapes)


def test_an_optimiser_whose_state_cannot_be_saved_is_refused(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    engine = _trained(batch)
    engine.optimizer.state[engine.partitions[0]]["exp_avg"] = torch.zeros(5)
    list(engine.shards())  # of whole tensors
    engine.sharded = True
    with pytest.raises(EngineMisuse, match=r"role 'model': the optimiser's 'exp_avg' is neither"):
        list(engine.shards())
