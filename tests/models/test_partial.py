"""Roles that learn the parameters a regular expression names: which these are, what changes, what stays, and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gentrain.config import ConfigError
from gentrain.models.adapters import Base
from gentrain.models.dit import DiT
from gentrain.models.partial import Partial, chosen_parameters
from gentrain.recipes.export import Export
from gentrain.training.loop import train
from gentrain.training.memory import memory_of
from gentrain.training.roles import Roles, count_parameters, load_network, load_weights
from gentrain.training.run import save_config
from gentrain.training.world import World
from tests.distributed.adapter_cases import ADAPTER, partial
from tests.distributed.cases import difference, records, run_of, state_of, values

ALONE = World(0, 1, torch.device("cpu"))


def _trained(settings: dict[str, Any]) -> Path:
    run = run_of(settings)
    save_config(run)
    train(run, ALONE, lambda: False)
    return run.directory


# --- which parameters ---


def test_a_name_is_chosen_where_the_expression_is_found_in_it() -> None:
    network = DiT(layers=2, heads=2, head_dim=8).build((1, 8, 8), 3)
    everything = [name for name, _ in network.named_parameters()]
    assert chosen_parameters(network, "") == everything
    assert chosen_parameters(network, r"attn1\.to_[qk]\.weight") == [n for n in everything if n[-11:] in ("to_q.weight", "to_k.weight")]
    assert chosen_parameters(network, r"^transformer_blocks\.1\.ff") == chosen_parameters(network, r"^backbone\.transformer_blocks\.1\.ff")
    assert len(chosen_parameters(network, r"^transformer_blocks\.1\.ff")) == 4
    assert chosen_parameters(network, r"bias$") == [name for name in everything if name.endswith(".bias")]


def test_an_expression_that_is_found_nowhere_tells_the_nearest_names() -> None:
    network = DiT(layers=1, heads=2, head_dim=8).build((1, 8, 8), 3)
    with pytest.raises(ValueError, match=r"'atn1\\\\\.to_q' is found in no name of its \d+ parameters; the nearest are \S*attn1\.to_q"):
        chosen_parameters(network, r"atn1\.to_q")


def test_mistakes_name_their_keys(tmp_path: Path) -> None:
    run = run_of(partial(tmp_path) | {"trainable": "hiden"})
    for refused in (lambda: Roles(run, ALONE), lambda: count_parameters(run, "student"), lambda: memory_of(run)):
        with pytest.raises(ConfigError, match=r"trainable: 'hiden' is found in no name .* nearest are hidden\.2\.weight, "):
            refused()
    with pytest.raises(ConfigError, match=r"^test: trainable: '\(' is no regular expression"):
        run_of(partial(tmp_path) | {"trainable": "("})
    with pytest.raises(ConfigError, match=r"trainable: a role learns an adapter or some of its parameters, not both"):
        run_of(partial(tmp_path) | {"adapter": ADAPTER})
    with pytest.raises(ConfigError, match=r"roles\.student\.trainable: a role learns an adapter or"):
        run_of(values(tmp_path) | {"roles": {"student": {"trainable": "x", "adapter": ADAPTER}}})
    with pytest.raises(ConfigError, match=r"roles\.teacher\.trainable: this role does not learn"):
        run_of(values(tmp_path) | {"roles": {"teacher": {"trainable": "x"}}})
    with pytest.raises(ConfigError, match=r"roles\.student\.placement: parameters that learn need those of the others whole"):
        run_of(partial(tmp_path) | {"roles": {"student": {"placement": "sharded"}}})
    with pytest.raises(ConfigError, match=r"roles\.critic\.trainable: 'nothing' is found in no name"):
        Roles(run_of(values(tmp_path) | {"roles": {"critic": {"trainable": "nothing"}}}), ALONE)


def test_a_role_may_choose_otherwise_than_the_run(tmp_path: Path) -> None:
    roles = {"critic": {"adapter": {"rank": 0}}, "student": {"trainable": "output"}}
    built = Roles(run_of(partial(tmp_path) | {"roles": roles}), ALONE)
    assert set(built.engines["student"].shapes) == {"own.output.weight", "own.output.bias"}
    assert list(built.bases) == ["student"] and "hidden.2.weight" in built.engines["critic"].shapes
    adapted = Roles(run_of(partial(tmp_path) | {"roles": {"critic": {"adapter": ADAPTER}}}), ALONE)
    assert "adapter.input.lora_A.weight" in adapted.engines["critic"].shapes
    of_an_adapted_run = values(tmp_path) | {"adapter": ADAPTER, "roles": {"student": {"trainable": "output"}}}
    assert set(Roles(run_of(of_an_adapted_run), ALONE).engines["student"].shapes) == {"own.output.weight", "own.output.bias"}


# --- what changes ---


class _Tied(nn.Module):
    """Uses a layer's weight without calling the layer, and one tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(x @ self.first.weight + self.first.bias))


def test_the_network_is_that_with_its_own_parameters_in_the_place_of_the_shared() -> None:
    torch.manual_seed(0)
    network, x = _Tied(), torch.randn(4, 3)
    with torch.no_grad():
        before = network(x)
    module = Partial(Base(network), r"first\.weight|second")
    assert torch.equal(module(x), before) and set(module.chosen) == {"first.weight", "second.weight"}
    for p in module.parameters():
        nn.init.normal_(p)
    first, second = module.chosen.values()
    output = module(x)
    torch.testing.assert_close(output, ((x @ first + network.first.bias) @ second.T) @ second.T)
    output.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert all(p.grad is None for p in network.parameters()) and torch.equal(network(x), before)
    module.fold()
    torch.testing.assert_close(network(x), output)


def test_all_parameters_are_a_full_run_to_the_last_bit_and_few_move_alone(tmp_path: Path) -> None:
    plain = values(tmp_path / "whole", "flow_matching") | {"model": {"name": "dropout_mlp", "dropout": 0}}
    whole = _trained(plain)
    all_of_them = _trained(plain | {"output": str(tmp_path / "all"), "trainable": "."})
    assert records(whole) == records(all_of_them)
    few = _trained(plain | {"output": str(tmp_path / "few"), "trainable": r"hidden|input\.bias"})
    start, end = Roles(run_of(plain), ALONE).engines["model"].weights(), load_weights(str(few))
    for name, value in load_weights(str(all_of_them)).items():
        assert torch.equal(value, load_weights(str(whole))[name])
        learns = name.startswith("hidden") or name == "input.bias"
        assert torch.equal(end[name], start[name]) is not learns, name


def test_another_run_begins_with_it_and_a_checkpoint_holds_it_alone(tmp_path: Path) -> None:
    source = _trained(partial(tmp_path / "source", method="flow_matching"))
    names = {name for name in state_of(source) if name.startswith("model.weights")}
    layers = ("hidden.2", "hidden.4", "output")
    assert names == {f"model.weights/own.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    weights = load_weights(str(source))
    full = values(tmp_path / "full", "flow_matching") | {"roles": {"model": {"weights": str(source)}}}
    learnt = Roles(run_of(full), ALONE).engines["model"].weights()
    assert all(torch.equal(value, weights[name]) for name, value in learnt.items())
    again = Roles(run_of(partial(tmp_path / "again", method="flow_matching") | {"roles": full["roles"]}), ALONE).engines["model"]
    assert all(torch.equal(value, weights[name.removeprefix("own.")]) for name, value in again.weights().items())
    network: Any = load_network(source)[0].network
    assert isinstance(network, Partial) and not network.training


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = _trained(partial(tmp_path / "whole"))
    halves = run_of(partial(tmp_path / "halves"))
    asked = iter(range(100))
    train(halves, ALONE, lambda: next(asked) == 3)
    train(halves, ALONE, lambda: False)
    assert records(whole) == records(tmp_path / "halves") and difference(state_of(whole), state_of(tmp_path / "halves")) == 0


def test_it_is_exported_within_its_network(tmp_path: Path) -> None:
    settings = partial(tmp_path / "run", method="flow_matching") | {"trainable": "attn|conv_in", "data": {"name": "mnist5k"}}
    settings |= {"model": {"name": "unet", "channels": [8, 16], "attention_head_dim": 8, "norm_groups": 4}}
    settings["training"] |= {"samples": 12}
    with pytest.raises(ConfigError, match=r"trainable: 'attn2\|conv-in' is found in no name"):
        Roles(run_of(settings | {"trainable": "attn2|conv-in"}), ALONE)
    run = _trained(settings | {"trainable": "attentions|conv_in"})
    from diffusers import UNet2DModel

    exported = UNet2DModel.from_pretrained(Export(run=str(run)).write(tmp_path / "out") / "network")
    weights = load_weights(str(run))
    assert all(torch.equal(value, weights[f"backbone.{name}"]) for name, value in exported.state_dict().items())


def test_a_plan_counts_what_learns_and_what_lies_below(tmp_path: Path) -> None:
    run = run_of(partial(tmp_path))
    total, learning = count_parameters(run, "student")
    assert learning == 7 * 11 + 11 + 11 * 7 + 7 + 7 * 2 + 2 < total
    parts = {part.name: part for part in memory_of(run).parts}
    assert parts["below teacher, critic, student, reference"].weights == 4 * total
    held = parts["student"].held
    assert held is not None and (held.weights, held.gradients) == (4 * learning, 4 * learning)
