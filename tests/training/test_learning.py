"""How parameters learn: a schedule-free optimiser's average, learning rates by group and batch, the time in which units are dropped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gentrain.config import ConfigError, register
from gentrain.methods.base import Batch, Clock, Method
from gentrain.methods.flow_matching import FlowMatching
from gentrain.models.base import Codec
from gentrain.training.callbacks import HeldOut
from gentrain.training.optimizers import AdamW, Averaging
from gentrain.training.roles import Roles, count_parameters, load_weights
from gentrain.training.run import save_config
from gentrain.training.world import World
from tests.distributed.cases import Job, difference, records, run_of, state_of, train_all, values

ALONE = World(0, 1, torch.device("cpu"))
FREE = {"optimizer": {"name": "schedule_free", "lr": 0.05}}
PLAIN = {"model": {"name": "dropout_mlp", "dropout": 0}}


def _train(output: Path, changed: dict[str, Any], stop_at: int | None = None, **training: Any) -> dict[str, torch.Tensor]:
    """The newest checkpoint of a run of 6 steps of 12 samples."""
    settings = values(output, "flow_matching", **training) | changed
    save_config(run_of(settings))
    assert train_all(ALONE, [Job(settings, stop_at)]) == [("finished" if stop_at is None else "stopped", "")]
    return state_of(output)


# --- an optimiser that averages -----------------------------------------------------------------------------------------------


def test_what_a_schedule_free_optimiser_learns_is_its_average(tmp_path: Path) -> None:
    state = _train(tmp_path, FREE)
    names = [key.removeprefix("model.optimizer/z/") for key in state if key.startswith("model.optimizer/z/")]
    assert names
    for name in names:
        y, z, x = (state[f"model.{kind}/{name}"] for kind in ("weights", "optimizer/z", "ema"))
        torch.testing.assert_close(y, 0.9 * x + 0.1 * z)
    assert max((state[f"model.weights/{name}"] - state[f"model.ema/{name}"]).abs().max() for name in names) > 1e-3
    loaded = load_weights(str(tmp_path))  # by `sample`, `evaluate`, `export` and roles that begin with it
    assert all(torch.equal(loaded[name], state[f"model.ema/{name}"]) for name in names)


def test_a_schedule_free_run_goes_on_bit_for_bit_and_has_no_half_life(tmp_path: Path) -> None:
    whole = _train(tmp_path / "whole", FREE)
    _train(tmp_path / "halves", FREE, stop_at=3)
    assert difference(whole, _train(tmp_path / "halves", FREE)) == 0
    assert difference(whole, _train(tmp_path / "other", FREE, ema_half_life=3)) == 0


def test_a_role_without_an_average_cannot_hold_what_it_learns() -> None:
    with pytest.raises(
        ConfigError, match=r"roles\.critic\.optimizer: schedule_free learns an average, and role 'critic' keeps none; .*adamw"
    ):
        run_of(values(Path("unused")) | FREE)
    run_of(values(Path("unused")) | FREE | {"roles": {"critic": {"optimizer": "adamw"}}})
    with pytest.raises(ConfigError, match=r"training\.power_ema: .*leave them out"):
        run_of(values(Path("unused"), "flow_matching", power_ema=[0.1]) | FREE)


def test_engines_ask_the_optimiser_itself_for_the_average() -> None:
    run = run_of(values(Path("unused"), "flow_matching") | FREE)
    engine = run.engine.build("model", run.model.build((2,), 3), run.optimizer, ALONE)
    engine.start_ema()
    assert engine.ema is not None and isinstance(engine.optimizer, Averaging)
    for step in range(3):
        torch.manual_seed(step)
        engine.backward(engine(torch.randn(4, 2), torch.rand(4)).square().mean(), last=True)
        engine.step(0.05)
        engine.update_ema(0.5)
    for p, x in zip(engine.partitions, engine.ema, strict=True):
        assert torch.equal(x, engine.optimizer.average(p))


@register("examined_flow")
@dataclass
class ExaminedFlow(FlowMatching):
    """Says of held-out data how large the weights are that it is shown."""

    @property
    def held_out(self) -> int:
        return 4

    def examine(self, network: nn.Module, batch: Batch, codec: Codec) -> dict[str, float]:
        return {"size": sum(p.abs().sum().item() for p in network.parameters())}


@pytest.mark.parametrize("free", [True, False])
def test_held_out_data_are_shown_to_the_average_where_that_is_what_is_learnt(free: bool) -> None:
    run = run_of(values(Path("unused"), "examined_flow") | (FREE if free else {}))
    roles = Roles(run, ALONE)
    engine = roles.engines["model"]
    for _ in range(2):
        engine.backward(engine(torch.ones(4, 2), torch.ones(4)).square().mean(), last=True)
        engine.step(0.1)
        engine.update_ema(0.5)
    trainer: Any = SimpleNamespace(run=run, roles=roles, world=ALONE)
    expected = engine.ema_weights() if free else engine.weights()
    size = sum(value.abs().sum().item() for name, value in expected.items() if name != "scale")
    assert HeldOut(trainer).measure(trainer)["size"] == pytest.approx(size, rel=1e-5)
    assert (
        abs(sum(value.abs().sum() for value in engine.weights().values()) - sum(v.abs().sum() for v in engine.ema_weights().values()))
        > 1e-3
    )


# --- groups -------------------------------------------------------------------------------------------------------------------

SLOW = [{"parameters": "^labels|^output", "lr": 0.1}, {"parameters": "weight", "lr": 2.0, "schedule": "cosine"}]


def _grouped(groups: list[dict[str, Any]]) -> dict[str, Any]:
    return {"roles": {"model": {"groups": groups}}}


STEEP = {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.0}, "schedule": "constant"}


def test_each_group_has_its_learning_rate(tmp_path: Path) -> None:
    start = Roles(run_of(values(Path("unused"), "flow_matching")), ALONE).engines["model"].weights()
    alike, grouped = (_train(tmp_path / f"{len(groups)}", PLAIN | STEEP | _grouped(groups), stop_at=1) for groups in ([], SLOW))
    moved = {name: (alike[f"model.weights/{name}"] - value, grouped[f"model.weights/{name}"] - value) for name, value in start.items()}
    for name, (one, other) in moved.items():
        times = 0.1 if name.startswith(("labels", "output")) else 2.0 if "weight" in name else 1.0  # of the first group that fits
        torch.testing.assert_close(other, times * one, rtol=1e-4, atol=1e-7)
    assert moved["labels.weight"][0].abs().max() > 1e-4 and moved["input.bias"][0].abs().max() > 1e-4


def test_each_group_has_its_schedule(tmp_path: Path) -> None:
    _train(tmp_path, STEEP | _grouped(SLOW))
    rates = [(line["lr/model"], line["lr/model/1"], line["lr/model/2"]) for line in records(tmp_path)]
    cosine = run_of(values(Path("unused"), "flow_matching") | {"schedule": "cosine"}).schedule
    expected = [(0.1, 0.01, 0.2 * cosine.factor(Clock(12 * step, 12, 72))) for step in range(6)]
    assert rates == [pytest.approx(each) for each in expected]


def test_groups_that_would_do_nothing_are_refused() -> None:
    settings = values(Path("unused"), "flow_matching")
    for wrong, said in (
        ("nowhere", "is found in no name"),
        ("(", "is no regular expression"),
        ("^output", "all its parameters are in groups before it"),
    ):
        run = run_of(settings | _grouped([SLOW[0], {"parameters": wrong}]))
        for refused in (lambda run=run: Roles(run, ALONE), lambda run=run: count_parameters(run, "model")):
            with pytest.raises(ConfigError, match=rf"roles\.model\.groups\[1\]\.parameters: .*{said}"):
                refused()
    for name in ("prodigy", "dog", "schedule_free", "nag_gs"):
        with pytest.raises(ConfigError, match=rf"roles\.model\.groups: {name} has one step size for all .*take adamw"):
            run_of(settings | {"optimizer": name} | _grouped(SLOW))
    for key, value in {"groups": SLOW, "optimizer": "adamw", "schedule": "constant"}.items():
        teacher = {"teacher": {"weights": "runs/teacher", key: value}}
        with pytest.raises(ConfigError, match=rf"roles\.teacher\.{key}: this role does not learn; leave it out"):
            run_of(values(Path("unused"), "distribution_matching") | {"roles": teacher})


# --- the batch ----------------------------------------------------------------------------------------------------------------


def test_the_square_root_rule_leaves_the_way_by_samples_as_it_is() -> None:
    """Of 4,000 walkers in a bowl, whose gradients are mostly noise: where they are on average, and how far apart."""

    def walk(optimizer: AdamW, batch: int) -> tuple[float, float]:
        generator, x = torch.Generator().manual_seed(batch), nn.Parameter(torch.ones(4_000))
        built = optimizer.build([x])
        for _ in range(2_000 // batch):
            x.grad = x.detach() + 10 * batch**-0.5 * torch.randn(len(x), generator=generator)
            built.step()
        return x.mean().item(), x.std().item()

    small = AdamW(lr=3e-3, beta1=0.9, beta2=0.99)
    mean, spread = walk(small, 1)
    assert 0.3 < mean < 0.7
    assert walk(small.scaled(4), 4) == (pytest.approx(mean, rel=0.04), pytest.approx(spread, rel=0.04))
    for other in (small, AdamW(lr=12e-3, beta1=0.9, beta2=0.99)):  # as it is, and times four
        assert abs(walk(other, 4)[0] / mean - 1) > 0.2


def test_the_rule_is_that_of_the_paper() -> None:
    run = run_of(values(Path("unused"), "flow_matching", batch_size=48, reference_batch_size=12))
    ours, given = run.optimizer_of("model"), run.optimizer
    assert isinstance(ours, AdamW) and isinstance(given, AdamW)
    assert (ours.lr, ours.eps) == (2 * given.lr, given.eps / 2)
    assert (1 - ours.beta1, 1 - ours.beta2) == (pytest.approx(4 * (1 - given.beta1)), pytest.approx(4 * (1 - given.beta2)))
    assert ours.weight_decay * ours.lr == pytest.approx(4 * given.weight_decay * given.lr)  # as much per sample
    alike = run_of(values(Path("unused"), "flow_matching", reference_batch_size=12)).optimizer_of("model")
    assert isinstance(alike, AdamW) and alike.beta1 == pytest.approx(given.beta1) and alike.lr == given.lr


def test_batches_and_optimisers_that_the_rule_does_not_reach_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"training\.reference_batch_size: the rule reaches batches 10 times as large, this one is 12 times"
    ):
        run_of(values(Path("unused"), "flow_matching", reference_batch_size=1))
    with pytest.raises(ConfigError, match=r"training\.reference_batch_size: there is no rule for lion; take adamw"):
        run_of(values(Path("unused"), "flow_matching", reference_batch_size=6) | {"optimizer": "lion"})


def test_the_rule_changes_how_a_run_trains(tmp_path: Path) -> None:
    _train(tmp_path, {"schedule": "constant"}, reference_batch_size=3)
    assert [line["lr/model"] for line in records(tmp_path)] == [0.02] * 6


# --- dropout ------------------------------------------------------------------------------------------------------------------


def _losses(directory: Path) -> list[float]:
    return [line["loss/model"] for line in records(directory)]


def test_early_and_late_dropout(tmp_path: Path) -> None:
    _train(tmp_path / "always", {})
    _train(tmp_path / "never", PLAIN)
    _train(tmp_path / "early", {}, dropout_until=36)
    _train(tmp_path / "late", {}, dropout_from=36)
    always, never, early, late = (_losses(tmp_path / name) for name in ("always", "never", "early", "late"))
    assert early[:3] == always[:3] and late[:3] == never[:3]
    assert all(a != b for a, b in zip(early[3:] + late[3:], always[3:] + never[3:], strict=True))
    assert always[0] != never[0]
    _train(tmp_path / "halves", {}, stop_at=2, dropout_until=36)
    assert difference(_train(tmp_path / "halves", {}, dropout_until=36), state_of(tmp_path / "early")) == 0


def test_layers_drop_within_their_time_only() -> None:
    roles = Roles(run_of(values(Path("unused"), "flow_matching", dropout_from=24, dropout_until=48)), ALONE)
    layer = next(module for module in roles.engines["model"].module.modules() if isinstance(module, nn.Dropout))
    shares = []
    for samples in (0, 12, 24, 36, 48, 60):
        roles.drop(samples)
        shares.append(layer.p)
    assert shares == [0, 0, 0.1, 0.1, 0, 0]


def test_a_time_for_dropout_where_nothing_is_dropped_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(values(Path("unused"), "flow_matching", dropout_until=36) | PLAIN)
    with pytest.raises(ConfigError, match=r"training\.dropout_until: no network that learns drops units"):
        Roles(run, ALONE)
    monkeypatch.setattr(Method.available()["flow_matching"], "dropout", False)
    with pytest.raises(ConfigError, match=r"training\.dropout_from: flow_matching drops no units; leave it out"):
        run_of(values(Path("unused"), "flow_matching", dropout_from=36))


@pytest.mark.parametrize(("until", "last"), [(None, 60), (999, 60), (36, 24), (37, 36)])  # of 72 samples, in steps of 12
def test_a_time_for_dropout_in_which_no_step_begins_is_refused(until: int | None, last: int) -> None:
    run_of(values(Path("unused"), "flow_matching", dropout_from=last, dropout_until=until))
    with pytest.raises(ConfigError, match=r"training\.dropout_from: no step of the run would drop units; lower it, or raise"):
        run_of(values(Path("unused"), "flow_matching", dropout_from=last + 1, dropout_until=until))


# --- another optimiser in silence -----------------------------------------------------------------------------------------------


def test_fira_of_a_network_without_matrices_to_project_is_refused() -> None:
    run = run_of(values(Path("unused"), "flow_matching") | {"optimizer": {"name": "fira", "rank": 7}})  # of layers of 7 units
    for refused in (lambda: Roles(run, ALONE), lambda: count_parameters(run, "model")):
        with pytest.raises(ConfigError, match=r"optimizer\.rank: .*fira would be adamw; set it to less than 7"):
            refused()
    Roles(run_of(values(Path("unused"), "flow_matching") | {"optimizer": {"name": "fira", "rank": 6}}), ALONE)
