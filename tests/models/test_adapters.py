"""Adapters: the change they make, the layers they name, the network below that never moves, and mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from gentrain.config import ConfigError
from gentrain.models.adapters import Adapted, Adapter, Base, digest_of, target_layers
from gentrain.models.base import Model
from gentrain.models.dit import DiT
from gentrain.models.mlp import MLP
from gentrain.models.unet import UNet
from gentrain.recipes.export import Export
from gentrain.training.checkpoint import CheckpointError
from gentrain.training.loop import train
from gentrain.training.roles import Roles, count_parameters, load_network, load_weights
from gentrain.training.run import save_config
from gentrain.training.world import World
from tests.distributed.adapter_cases import ADAPTER, adapted
from tests.distributed.cases import run_of, state_of, values

ALONE = World(0, 1, torch.device("cpu"))


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 7)
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def _with_changes(network: nn.Module, adapter: Adapter) -> Adapted:
    """An adapter whose B is no longer zero."""
    torch.manual_seed(0)
    module = Adapted(Base(network), adapter)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


# --- the change ---


def test_a_linear_layer_gains_alpha_over_rank_times_b_a() -> None:
    module = _with_changes(_Layers(), Adapter(rank=2, alpha=3.0, targets=("linear",)))
    layer, x = module.base.network.linear, torch.randn(6, 5)
    a, b = (module.state_dict()[f"adapter.linear.lora_{half}.weight"].double() for half in "AB")
    expected = x.double() @ layer.weight.double().T + layer.bias.double() + 1.5 * (x.double() @ a.T) @ b.T
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.merged()["linear.weight"].double(), layer.weight.double() + 1.5 * b @ a, rtol=1e-6, atol=1e-6)


def test_a_convolution_gains_a_convolution_of_low_rank() -> None:
    network = _Layers()
    module = _with_changes(network, Adapter(rank=2, alpha=5.0, targets=("conv",)))
    network.forward = network.conv.__call__  # type: ignore[method-assign]
    x = torch.randn(2, 3, 8, 8)
    a, b = (module.state_dict()[f"adapter.conv.lora_{half}.weight"].double() for half in "AB")
    kernel = network.conv.weight.double() + 2.5 * torch.einsum("orxy,rikl->oikl", b, a)
    expected = conv2d(x.double(), kernel, network.conv.bias.double(), stride=2, padding=1)  # type: ignore[union-attr]
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.merged()["conv.weight"].double(), kernel, rtol=1e-6, atol=1e-6)


NETWORKS: dict[str, tuple[Model, tuple[int, ...], tuple[str, ...]]] = {
    "mlp": (MLP(width=16, depth=2), (2,), ("linear",)),
    "unet": (UNet(channels=(8, 16), attention_head_dim=8, norm_groups=4), (1, 8, 8), ("attention", "convolutions")),
    "dit": (DiT(layers=2, heads=2, head_dim=8), (1, 8, 8), ("attention", "feed_forward")),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_at_first_nothing_changes_then_it_does_and_merged_weights_do_the_same(name: str) -> None:
    model, shape, targets = NETWORKS[name]
    torch.manual_seed(0)
    network = model.build(shape, 3)
    for p in network.parameters():  # dit begins with zeros, through which nothing passes
        nn.init.normal_(p, std=0.1)
    x, t, condition = torch.randn(4, *shape), torch.rand(4) * 1000, {"label": torch.tensor([0, 1, 2, -1])}
    with torch.no_grad():
        network.eval()
        before = network(x, t, condition)
        module = Adapted(Base(network), Adapter(rank=2, targets=targets))
        assert torch.equal(module(x, t, condition), before)
        for p in module.parameters():
            nn.init.normal_(p, std=0.3)
        changed = module(x, t, condition)
        assert (changed - before).abs().max() > 1e-3
        assert torch.equal(network(x, t, condition), before)  # off again
        module.fold()
        torch.testing.assert_close(network(x, t, condition), changed, rtol=1e-3, atol=1e-3)


def test_two_adapters_on_one_network_pass_gradients_to_their_own_and_to_the_input() -> None:
    base = Base(_Layers())
    first, second = (Adapted(base, Adapter(rank=2, targets=("linear",))) for _ in range(2))
    for module in (first, second):
        for p in module.parameters():
            nn.init.normal_(p)
    x = torch.randn(3, 5, requires_grad=True)
    first(second(x)[:, :5]).sum().backward()
    assert x.grad is not None and all(p.grad is not None and p.grad.abs().sum() > 0 for m in (first, second) for p in m.parameters())
    assert all(p.grad is None and not p.requires_grad for p in base.network.parameters())
    assert {id(p) for p in first.parameters()}.isdisjoint({id(p) for p in (*base.network.parameters(), *second.parameters())})


# --- which layers ---


def test_words_kinds_and_ends_of_names_choose_layers() -> None:
    network = NETWORKS["dit"][0].build((1, 8, 8), 3)
    attention = target_layers(network, ("attention",))
    assert len(attention) == 8 and all(name.split(".")[-2:] == ["to_out", "0"] or name.split(".")[-1][:3] == "to_" for name in attention)
    assert [name.split("ff.")[1] for name in target_layers(network, ("feed_forward",))] == ["net.0.proj", "net.2"] * 2
    assert target_layers(network, ("to_q", "attention")) == attention
    assert len(target_layers(network, ("linear",))) == sum(isinstance(m, nn.Linear) for m in network.modules())
    assert target_layers(_Layers(), ("convolutions",)) == ["conv"]  # a grouped one takes none


def test_targets_that_are_not_there_are_told() -> None:
    with pytest.raises(ValueError, match=r"no layer is called 'linaer'; did you mean 'linear'\?"):
        target_layers(_Layers(), ("linaer",))
    with pytest.raises(ValueError, match=r"no layer is called 'to_q'; there are attention, .*linear"):
        target_layers(_Layers(), ("to_q",))
    with pytest.raises(ValueError, match=r"no layer is called 'feed_forward'; there are attention, .*linear"):
        target_layers(_Layers(), ("feed_forward",))
    with pytest.raises(ValueError, match=r"'grouped' is a grouped convolution"):
        target_layers(_Layers(), ("grouped",))


def test_a_rank_that_no_layer_has_is_refused() -> None:
    """3 -> 5 linear layers have at most 3, a 3 x 3 convolution of 2 channels into 7 at most 7."""
    for layer, most in ((nn.Linear(3, 5), 3), (nn.Conv2d(2, 7, 3), 7)):
        base = Base(nn.Sequential(layer))
        Adapted(base, Adapter(rank=most, targets=("0",)))
        with pytest.raises(ValueError, match=rf"rank {most + 1} on layers whose weights have at most {most}; lower its rank"):
            Adapted(base, Adapter(rank=most + 1, targets=("0",)))


# --- runs ---


def _run(tmp_path: Path, name: str = "run", **more: Any) -> dict[str, Any]:
    return adapted(tmp_path / name) | more


def _trained(settings: dict[str, Any]) -> Path:
    run = run_of(settings)
    save_config(run)
    train(run, ALONE, lambda: False)
    return run.directory


def test_roles_that_begin_alike_share_one_network_and_others_do_not(tmp_path: Path) -> None:
    roles = Roles(run_of(_run(tmp_path)), ALONE)
    bases = {name: roles.engines[name].module.base for name in ("critic", "student")}  # type: ignore[union-attr]
    assert bases["critic"] is bases["student"]
    assert roles.frozen["teacher"] is roles.frozen["reference"] is bases["student"].network
    apart = Roles(run_of(_run(tmp_path, method="relay")), ALONE)  # whose critic has weights of its own
    assert apart.engines["critic"].module.base is not apart.engines["student"].module.base  # type: ignore[union-attr]
    assert apart.frozen["teacher"] is apart.engines["student"].module.base.network  # type: ignore[union-attr]


def test_a_role_may_have_its_own_adapter_or_none(tmp_path: Path) -> None:
    roles = {"critic": {"adapter": {"rank": 0}}, "student": {"adapter": {"rank": 1, "targets": ["output"]}}}
    run = run_of(_run(tmp_path, roles=roles))
    built = Roles(run, ALONE)
    assert not isinstance(built.engines["critic"].module, Adapted) and list(built.bases) == ["student"]
    assert set(built.engines["student"].shapes) == {"adapter.output.lora_A.weight", "adapter.output.lora_B.weight"}
    whole, learning = count_parameters(run, "student")
    assert (count_parameters(run, "critic"), learning) == ((whole, whole), 7 + 2)
    assert count_parameters(run, "teacher") == (whole, 0)


def test_wrong_targets_and_placements_are_mistakes_of_their_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.targets: no layer is called 'attention'"):
        Roles(run_of(_run(tmp_path, adapter={"rank": 2})), ALONE)
    with pytest.raises(ConfigError, match=r"adapter\.alpha: expected a number > 0 or null, got inf"):
        run_of(_run(tmp_path, adapter={"rank": 2, "alpha": float("inf")}))
    with pytest.raises(ConfigError, match=r"roles\.student\.adapter\.targets: no layer is called 'to_q'"):
        Roles(run_of(_run(tmp_path, roles={"student": {"adapter": {"targets": ["to_q"]}}})), ALONE)
    with pytest.raises(ConfigError, match=r"roles\.student\.placement: what lies below an adapter is plain or sharded"):
        run_of(_run(tmp_path, roles={"student": {"placement": "offloaded"}}))
    with pytest.raises(ConfigError, match=r"roles\.student\.placement: .*learns, so its engine places it"):
        run_of(values(tmp_path / "whole") | {"roles": {"student": {"placement": "sharded"}}})
    with pytest.raises(ConfigError, match=r"adapter: targets is empty"):
        run_of(_run(tmp_path, adapter={"targets": []}))


def test_weights_are_told_from_others_by_names_shapes_and_values() -> None:
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    renamed, bent, moved = {"c": weights["a"], "d": weights["b"]}, weights["a"].reshape(3, 2), weights["a"] + 1e-6
    others: list[dict[str, Tensor]] = [renamed, weights | {"a": bent}, weights | {"a": moved}, {"a": weights["a"]}]
    assert digest_of(dict(reversed(weights.items()))) == digest_of(weights) == digest_of({k: v.double() for k, v in weights.items()})
    assert len({digest_of(each) for each in (weights, *others)}) == 5


def test_an_adapter_is_refused_on_other_weights(tmp_path: Path) -> None:
    source = _trained(values(tmp_path / "source", "flow_matching", samples=12))
    settings = _run(tmp_path, method="flow_matching", roles={"model": {"weights": str(source)}})
    settings["model"] = "dropout_mlp"
    run = _trained(settings)
    assert all("lora" in name or name.endswith("/step") for name in state_of(run))
    shutil.rmtree(source)
    _trained(values(source, "flow_matching", samples=24))
    with pytest.raises(CheckpointError, match=r"role .model. learnt .* was trained on other weights .* restore"):
        load_network(run)
    with pytest.raises(CheckpointError, match=r"role .model. learnt .* was trained on other weights"):
        train(run_of(settings | {"training": {**settings["training"], "samples": 144}}), ALONE, lambda: False)


def test_another_run_begins_with_what_the_adapter_came_to(tmp_path: Path) -> None:
    source = _trained(_run(tmp_path, "source", method="flow_matching"))
    network: Any = load_network(source)[0].network
    assert isinstance(network, Adapted) and not network.training
    weights = load_weights(str(source))
    assert all(torch.equal(value, weights[name]) for name, value in network.merged().items())
    follower = Roles(run_of(_run(tmp_path, "next", method="flow_matching", roles={"model": {"weights": str(source)}})), ALONE)
    below = follower.engines["model"].module.base.network.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(value, weights[name]) for name, value in below.items())


def test_a_network_of_the_project_is_exported_with_its_adapter_merged(tmp_path: Path) -> None:
    settings = _run(tmp_path, method="flow_matching", adapter=ADAPTER | {"targets": ["attention"]})
    settings |= {"data": {"name": "mnist5k"}, "model": {"name": "unet", "channels": [8, 16], "attention_head_dim": 8, "norm_groups": 4}}
    settings["training"] |= {"samples": 12}
    run = _trained(settings)
    out = Export(run=str(run)).write(tmp_path / "out")
    from diffusers import UNet2DModel

    exported, network = UNet2DModel.from_pretrained(out / "network"), load_network(run)[0].network
    merged = network.merged()  # type: ignore[attr-defined]
    assert all(torch.equal(value, merged[f"backbone.{name}"]) for name, value in exported.state_dict().items())
    with pytest.raises(ConfigError, match="form: the network came from no pipeline"):
        Export(run=str(run), form="adapter").write(tmp_path / "adapter")
