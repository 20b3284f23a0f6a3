"""Every optimiser of the registry: it learns, each field counts, it sees no more of a parameter than it says, and its state survives."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gentrain.config import ConfigError
from gentrain.training.optimizers import Optimizer, Schedule, elementwise, whole
from gentrain.training.storage import LocalStorage
from gentrain.training.world import World
from tests.distributed.cases import run_of, values
from tests.reliability.publishing import publish

# Settings under which 12 steps go far enough to tell optimisers apart.
ENTRIES: dict[str, dict[str, Any]] = {
    "adamomentum": {"lr": 0.02},
    "adamp": {"lr": 0.02, "delta": 5.0},
    "adamw": {"lr": 0.02},
    "ademamix": {"lr": 0.02, "beta3": 0.9},
    "dog": {"initial": 0.02},
    "fira": {"lr": 0.02, "rank": 2, "every": 3},
    "grams": {"lr": 0.02},
    "lion": {"lr": 0.02},
    "mars": {"lr": 0.02},
    "muon": {"lr": 0.02},
    "nag_gs": {"lr": 0.2},
    "optimistic_amsgrad": {"lr": 0.02},
    "prodigy": {"d0": 0.02},
    "radam": {"lr": 0.1},
    "ranger21": {"lr": 0.1},
    "schedule_free": {"lr": 0.02},
    "sgd": {"lr": 0.02},
    "sgd_sai": {"lr": 0.01},
    "sgdp": {"lr": 0.02, "delta": 5.0},
    "soap": {"lr": 0.02, "every": 3},
    "subset_norm": {"lr": 0.02},
}
# Another value of each field; a field that is not here is raised by a half.
OTHER = {
    "beta1": 0.5,
    "beta2": 0.7,
    "beta3": 0.5,
    "momentum": 0.5,
    "weight_decay": 0.5,
    "warmup": 20,
    "eps": 0.1,
    "steps": 2,
    "rank": 1,
    "every": 2,
    "wd_ratio": 0.7,
    "delta": 1e-4,
}
SHAPES = [(5, 7), (5,), (3, 5), (3,)]
SIZES = [torch.Size(shape).numel() for shape in SHAPES]
CUT = 30  # inside the first matrix


def entry(name: str, **fields: Any) -> Optimizer:
    return Optimizer.available()[name](**{**ENTRIES[name], **fields})


def pieces(flat: Tensor, shaped: bool) -> list[Tensor]:
    return [part.reshape(shape) for part, shape in zip(flat.split(SIZES), SHAPES)] if shaped else [flat]


def walk(optimizer: Optimizer, start: Tensor, gradients: Tensor, shaped: bool = False) -> Tensor:
    """Where the parameters, flat, are after steps along fixed gradients [steps, elements]."""
    parameters = [nn.Parameter(part.clone()) for part in pieces(start, shaped)]
    built = optimizer.build(parameters)
    for gradient in gradients:
        for p, g in zip(parameters, pieces(gradient, shaped)):
            p.grad = g.clone()
        built.step()
    return torch.cat([p.detach().flatten() for p in parameters])


def problem(steps: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = 0.3 * torch.randn(sum(SIZES), generator=generator)
    return start, torch.randn(steps, sum(SIZES), generator=generator) + torch.randn(sum(SIZES), generator=generator)


def test_the_table_is_the_registry() -> None:
    ours = {name for name, kind in Optimizer.available().items() if kind.__module__.startswith("gentrain.")}
    assert ours == set(ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_what_an_entry_says_it_needs_is_what_it_needs(name: str) -> None:
    start, gradients = problem()
    shaped, flat = (walk(entry(name), start, gradients, shaped) for shaped in (True, False))
    halves = [walk(entry(name), start[part], gradients[:, part]) for part in (slice(CUT), slice(CUT, None))]
    across, between = (((shaped - other).abs().max() / shaped.abs().max()).item() for other in (flat, torch.cat(halves)))
    assert (shaped - start).abs().max() > 0.01
    if entry(name).needs == "elementwise":
        assert max(across, between) < 1e-6
    elif entry(name).needs == "global_scalar":
        assert across < 1e-6 and between > 1e-4  # without the sum over ranks
    else:
        assert across > 1e-3  # what the refusal prevents; 2.4e-3 (adamp) to 0.1


FIELDS = [(name, field.name) for name in ENTRIES for field in dataclasses.fields(Optimizer.available()[name])]  # type: ignore[arg-type]


@pytest.mark.parametrize("name, field", FIELDS)
def test_every_field_counts(name: str, field: str) -> None:
    usual, (start, gradients) = entry(name), problem()
    other = OTHER.get(field) or 1.5 * getattr(usual, field)
    base = {"weight_decay": 0.1} if field == "wd_ratio" else {}
    a, b = (walk(entry(name, **base, **fields), start, gradients, shaped=True) for fields in ({}, {field: other}))
    assert (a - b).abs().max() > 1e-7


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_descends(name: str) -> None:
    """A quadratic with a condition number of 10 falls to less than half within 300 steps."""
    start, _ = problem()
    target, scale = torch.randn(len(start), generator=torch.Generator().manual_seed(1)), torch.linspace(0.2, 2, len(start))
    parameters = [nn.Parameter(part.clone()) for part in pieces(start, True)]
    built = entry(name, **({"delta": 0.1} if name in ("adamp", "sgdp") else {})).build(parameters)

    def loss() -> Tensor:
        return (scale * (torch.cat([p.flatten() for p in parameters]) - target).square()).mean()

    first = loss().item()
    for _ in range(300):
        built.zero_grad()
        loss().backward()
        built.step()
    assert loss().item() < 0.5 * first


@pytest.mark.parametrize("name", [name for name in ENTRIES if "weight_decay" in entry(name).__dict__])
def test_weights_that_must_not_decay_do_not(name: str) -> None:
    kept, pulled = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    kept.decays = False  # type: ignore[attr-defined]
    built = entry(name, weight_decay=0.5).build([pulled, kept])
    for _ in range(3):
        kept.grad, pulled.grad = torch.zeros(2, 3), torch.zeros(2, 3)
        built.step()
    assert torch.equal(kept, torch.ones(2, 3)) or name == "ranger21"  # whose norm loss pulls on all
    assert name in ("dog", "prodigy") or pulled.max() < 1  # whose steps are nothing without gradients


@pytest.mark.parametrize("name", ["ademamix", "grams", "lion", "mars", "adamp", "sgdp", "sgd_sai", "muon", "schedule_free"])
def test_counting_steps_for_checkpoints_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start, gradients = problem()
    ours = walk(entry(name), start, gradients, shaped=True)
    for module in (elementwise, whole):
        monkeypatch.setattr(module, "counted", lambda library, *sums: library)
    assert torch.equal(ours, walk(entry(name), start, gradients, shaped=True))


@pytest.mark.parametrize("name", [name for name in ENTRIES if entry(name).needs == "elementwise"])
def test_groups_may_be_stepped_one_after_the_other(name: str) -> None:
    """As ZeRO does, which empties the others, or takes them away, meanwhile."""
    start, gradients = problem()
    expected = torch.cat([walk(entry(name), start[part], gradients[:, part]) for part in (slice(CUT), slice(CUT, None))])
    for keeps in (True, False):
        parameters = [nn.Parameter(part.clone()) for part in (start[:CUT], start[CUT:])]
        built = entry(name).build(parameters)
        groups = [dict(built.param_groups[0]) for _ in parameters]
        for gradient in gradients:
            for p, g in zip(parameters, (gradient[:CUT], gradient[CUT:])):
                p.grad = g.clone()
            for stepped in range(len(groups)):
                for index, group in enumerate(groups):
                    group["params"] = parameters[index : index + 1] if index == stepped else []
                built.param_groups = groups if keeps else [groups[stepped]]
                built.step()
        assert torch.equal(torch.cat([p.detach() for p in parameters]), expected)


@pytest.mark.parametrize("name", ["soap", "fira", "subset_norm"])
@pytest.mark.parametrize("shape", [(35,), (5, 7), (9, 4), (6, 4, 3)])
def test_a_state_of_shapes_of_its_own_is_as_large_as_plans_say(name: str, shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.ones(shape))
    built = entry(name).build([p])
    for step in range(2):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        built.step()
    each, once = entry(name).state_bytes(shape)
    assert each * p.numel() + once == sum(value.nbytes for value in built.state[p].values() if isinstance(value, Tensor))


ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("name", ENTRIES)
def test_state_survives_a_checkpoint_bit_for_bit(name: str, tmp_path: Path) -> None:
    run = run_of(values(Path("unused"), "flow_matching", "torch") | {"optimizer": {"name": name, **ENTRIES[name]}})

    def built() -> Any:
        torch.manual_seed(0)
        return run.engine.build("model", run.model.build((2,), 3), run.optimizer, ALONE)

    def advance(engine: Any, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            engine.backward(engine(torch.randn(4, 2), torch.rand(4)).square().mean(), last=True)
            engine.step(run.optimizer.lr)

    whole, first, second = built(), built(), built()
    advance(whole, range(6))
    advance(first, range(3))
    storage = LocalStorage(tmp_path)
    published = publish(storage, 3, {f"model.{kind}": [shard] for kind, shard in first.shards()})
    with storage.open(published) as checkpoint:
        second.read(lambda kind: checkpoint.shards(f"model.{kind}"))
    second.refresh()
    advance(second, range(3, 6))
    assert all(torch.equal(value, second.weights()[key]) for key, value in whole.weights().items())
    fresh = built()  # with these weights but no state it goes elsewhere, so that the comparison says something
    with storage.open(published) as checkpoint, torch.no_grad():
        for key, value in checkpoint.shards("model.weights").whole().items():
            if key != "scale":
                fresh.module.get_parameter(key).copy_(value)
    advance(fresh, range(3, 6))
    assert any(not torch.equal(value, fresh.weights()[key]) for key, value in whole.weights().items())


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_configuration_refuses_what_shards_would_change(name: str, stage: int) -> None:
    settings = values(Path("unused"), "flow_matching", {"name": "deepspeed", "zero_stage": stage}) | {"optimizer": name}
    if stage and entry(name).needs in ("per_tensor", "matrix"):
        with pytest.raises(ConfigError, match=rf"{name} needs {entry(name).needs} access .*set engine.zero_stage to 0, engine to torch"):
            run_of(settings)
    else:
        run_of(settings)


def test_the_page_lists_the_registry() -> None:
    page = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (elementwise|global_scalar|per_tensor|matrix) \| ", page, re.MULTILINE))
    assert rows == {name: entry(name).needs for name in ENTRIES}
    schedules = [name for name, kind in Schedule.available().items() if kind.__module__.startswith("gentrain.")]
    assert [name for name in schedules if f"| `{name}` |" not in page] == []
