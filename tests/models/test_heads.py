"""Heads on features: which layers, of which shape, and that only they learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gentrain.models.adapters import Adapted, Adapter, Base
from gentrain.models.dit import DiT
from gentrain.models.heads import FeatureCritic, Heads, channels_last, feature_shapes, layers_of
from gentrain.models.mlp import MLP
from gentrain.models.unet import UNet

UNET = UNet(channels=(8, 16), norm_groups=4, attention_head_dim=8)
NETWORKS = {
    "unet": (UNET, (1, 8, 8), ["backbone.down_blocks.0", "backbone.down_blocks.1", "backbone.mid_block"], 2 * 16 + 16),
    "dit": (DiT(layers=2, heads=2, head_dim=8), (1, 6, 6), ["backbone.transformer_blocks.0", "backbone.transformer_blocks.1"], 9 + 9),
    "mlp": (MLP(width=16, depth=2), (2,), ["layers.0", "layers.1"], 1 + 1),
}


def critic_of(name: str, settings: Heads | None = None) -> tuple[FeatureCritic, tuple[int, ...]]:
    model, shape, _, _ = NETWORKS[name]
    settings = settings or Heads(width=8)
    torch.manual_seed(0)
    base = Base(model.build(shape, 3))
    with torch.device("meta"):
        shapes = feature_shapes(model.build(shape, 3), settings, shape)
    return FeatureCritic(base, settings, shapes), shape


@pytest.mark.parametrize("name", NETWORKS)
def test_each_position_of_each_block_has_a_logit(name: str) -> None:
    critic, shape = critic_of(name)
    assert layers_of(critic.base.network, Heads().layers) == NETWORKS[name][2]
    x, t = torch.randn(5, *shape), torch.linspace(0, 1000, 5)
    logits = critic(x, t, {"label": torch.arange(5) % 3})
    assert logits.shape == (5, NETWORKS[name][3])
    rows = torch.cat([critic(x[i : i + 1], t[i : i + 1], {"label": torch.tensor([i % 3])}) for i in range(5)])
    torch.testing.assert_close(logits, rows, rtol=1e-4, atol=1e-5)


def test_the_logits_are_the_heads_of_the_layers_own_outputs() -> None:
    critic, shape = critic_of("dit")
    network, seen = critic.base.network, []
    for block in network.backbone.transformer_blocks:
        block.register_forward_hook(lambda _, arguments, output: seen.append(output))
    x, t = torch.randn(2, *shape), torch.tensor([100.0, 900.0])
    logits = critic(x, t, None)
    expected = torch.cat([head(feature).flatten(1) for head, feature in zip(critic.heads, seen, strict=True)], 1)
    torch.testing.assert_close(logits, expected)
    assert not [block for block in network.modules() if len(block._forward_hooks) > 1]  # its own hooks are gone


def test_convolutional_features_are_read_along_their_channels() -> None:
    feature = torch.randn(2, 3, 4, 5)
    assert torch.equal(channels_last(feature)[1, 2, 3], feature[1, :, 2, 3])
    assert channels_last(feature[:, :, :, 0]) is not None and channels_last(feature[:, :, 0, 0]).shape == (2, 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_only_the_heads_learn_and_gradients_reach_x(name: str) -> None:
    critic, shape = critic_of(name)
    assert {key.split(".")[0] for key, _ in critic.named_parameters()} == {"heads"}
    for p in critic.base.network.parameters():
        p.data += 0.05 * torch.randn_like(p)  # blocks of a transformer begin as the identity
    x = torch.randn(2, *shape, requires_grad=True)
    critic(x, torch.tensor([200.0, 700.0]), None).mean().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    assert all(p.grad is not None for p in critic.heads.parameters())
    assert all(p.grad is None for p in critic.base.network.parameters())


def test_a_live_network_is_left_as_it_is() -> None:
    network = MLP(width=16, depth=2).build((2,), 3).train()
    base = Base(network, live=True)
    assert network.training and all(p.requires_grad for p in network.parameters())
    critic = FeatureCritic(base, Heads(), feature_shapes(network, Heads(), (2,)))
    critic.to(torch.bfloat16)
    assert next(network.parameters()).dtype == torch.float32
    with torch.no_grad():
        before = critic.float()(torch.ones(1, 2), torch.ones(1), None)
        network.input.weight += 1
        assert not torch.allclose(critic(torch.ones(1, 2), torch.ones(1), None), before)


def test_an_adapter_that_is_worn_is_read_with_the_network_below() -> None:
    torch.manual_seed(0)
    base = Base(MLP(width=16, depth=2).build((2,), 3))
    adapted = Adapted(base, Adapter(rank=2, targets=("linear",)))
    critic = FeatureCritic(Base(adapted, live=True), Heads(), feature_shapes(adapted, Heads(), (2,)))
    x, t = torch.ones(1, 2), torch.ones(1)
    before = critic(x, t, None)
    for p in adapted.parameters():
        p.data += 0.1
    assert not torch.allclose(critic(x, t, None), before)
    assert feature_shapes(base.network, Heads(), (2,)).keys() == {"layers.0", "layers.1"}


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Flatten(0)])
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, t: Tensor, condition: dict | None = None) -> Tensor:
        return x + self.layers[0](x).sum() * self.weight


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match=r"'mid' is found in no name of its layers; the outermost are input, .*layers"):
        layers_of(MLP().build((2,), 0), "mid")
    with pytest.raises(ValueError, match="no regular expression of layers"):
        Heads(layers="(")
    with pytest.raises(ValueError, match=r"layer 'layers\.0' gives no features"):
        feature_shapes(_Odd(), Heads(), (2,))
