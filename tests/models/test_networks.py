"""Every network that generates: shapes, the null class, labels, gradients, state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gentrain.models.base import Model
from gentrain.models.dit import DiT
from gentrain.models.mlp import MLP
from gentrain.models.unet import UNet

SMALL_UNET = UNet(channels=(8, 16), norm_groups=4, attention_head_dim=8, space_to_depth=2)
CASES = {
    "mlp": (MLP(width=16, depth=2), (2,)),
    "unet": (SMALL_UNET, (1, 8, 12)),
    "unet without attention": (UNet(channels=(8, 8, 16), norm_groups=4, attention=(), layers_per_block=2), (3, 8, 8)),
    "dit": (DiT(layers=2, heads=2, head_dim=8), (3, 6, 6)),
}


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def case(request):
    torch.manual_seed(0)
    return request.param


def network_of(model: Model, shape: tuple[int, ...], num_classes: int = 3) -> torch.nn.Module:
    """With every parameter away from zero, so that zero initialisation hides nothing."""
    network = model.build(shape, num_classes)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return network


def inputs(shape, batch=4):
    return torch.randn(batch, *shape), 1000 * torch.rand(batch)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_keeps_the_shape_and_uses_every_parameter(case, num_classes):
    model, shape = case
    network = network_of(model, shape, num_classes)
    x, t = inputs(shape)
    condition = {"label": torch.tensor([0, 2, -1, 1])} if num_classes else None
    y = network(x, t, condition)
    assert y.shape == x.shape and y.dtype == torch.float32
    y.square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_null_class_is_a_token_of_its_own(case):
    model, shape = case
    network = network_of(model, shape).eval()
    x, t = inputs((*shape,), batch=1)
    with torch.no_grad():
        outputs = [network(x, t, {"label": torch.tensor([label])}) for label in (-1, 0, 1, 2)]
        assert torch.equal(network(x, t), outputs[0])
    for i in range(4):
        for j in range(i):
            assert (outputs[i] - outputs[j]).abs().max() > 1e-4
    network.zero_grad()
    network(x, t, {"label": torch.tensor([-1])}).square().mean().backward()
    tables = [m for m in network.modules() if isinstance(m, torch.nn.Embedding)]
    assert tables
    for table in tables:
        assert table.weight.shape[0] == 4
        assert table.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [3]


def test_time_and_rows_are_read_row_by_row(case):
    model, shape = case
    network = network_of(model, shape).eval()
    x, t = inputs(shape)
    label = torch.tensor([0, 2, -1, 1])
    with torch.no_grad():
        together = network(x, t, {"label": label})
        alone = torch.cat([network(x[i : i + 1], t[i : i + 1], {"label": label[i : i + 1]}) for i in range(4)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        assert (network(x, t + 100, {"label": label}) - together).abs().max() > 1e-4


def test_training_mode_draws_nothing(case):
    model, shape = case
    network = network_of(model, shape).train()
    x, t = inputs(shape, batch=64)
    condition = {"label": torch.zeros(64, dtype=torch.int64)}
    state = torch.get_rng_state()
    torch.testing.assert_close(network(x, t, condition), network.eval()(x, t, condition))
    assert torch.equal(torch.get_rng_state(), state)


def test_same_seed_same_weights_and_state_goes_round(case):
    model, shape = case
    torch.manual_seed(1)
    first = model.build(shape, 3)
    torch.manual_seed(1)
    again = model.build(shape, 3)
    other = model.build(shape, 3)
    x, t = inputs(shape)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert any(not torch.equal(value, other.state_dict()[name]) for name, value in first.state_dict().items())
    other.load_state_dict(first.state_dict())
    assert torch.equal(other(x, t), first(x, t))


def test_bfloat16_network_takes_float32_input_and_exact_time(case):
    model, shape = case
    network = network_of(model, shape).to(torch.bfloat16)
    x, _ = inputs(shape, batch=1)
    y = network(x, torch.tensor([999.0]))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    # 999 and 1000 are one number in bfloat16
    assert not torch.equal(network(x, torch.tensor([999.0])), network(x, torch.tensor([1000.0])))


def test_space_to_depth_is_undone():
    network = UNet(channels=(8,), norm_groups=4, attention=(), space_to_depth=2).build((3, 4, 6), 0)
    seen = []

    class Identity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t, class_labels, return_dict):
            seen.append(x)
            return (x,)

    network.backbone = Identity()
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(network(x, torch.zeros(2)), x)
    assert seen[0].shape == (2, 12, 2, 3)
    assert torch.equal(seen[0][:, :4, 0, 0], x[:, 0, :2, :2].flatten(1))


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (MLP(), (1, 8, 8), "use unet or dit"),
        (UNet(), (2,), "use mlp"),
        (UNet(space_to_depth=2), (1, 28, 30), "28x30 pixels are not divisible by 4"),
        (UNet(channels=(32, 32, 32)), (1, 28, 30), "not divisible by 4"),
        (DiT(), (2,), "mlp for vectors"),
        (DiT(), (1, 8, 12), "square"),
        (DiT(patch_size=3), (1, 28, 28), "28 pixels are not divisible by patch_size 3"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_a_remedy(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model.build(shape, 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": (32, 60)}, "60 is not divisible by norm_groups 8"),
        ({"channels": (32, 48)}, "48 is not divisible by attention_head_dim 32"),
        ({"attention": (2,)}, "level 2, but channels has levels 0 to 1"),
        ({"channels": ()}, "at least one level"),
    ],
)
def test_unet_fields_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        UNet(**fields)


def test_dit_starts_as_zero_and_with_closed_gates():
    network = DiT(layers=1, heads=2, head_dim=8).build((1, 4, 4), 3)
    x, t = inputs((1, 4, 4))
    assert network(x, t).abs().max() == 0
    assert network.backbone.transformer_blocks[0].norm1.linear.weight.abs().max() == 0


@pytest.mark.parametrize("name", ["mlp", "unet", "dit"])
def test_the_time_is_scaled(name):
    model, shape = CASES[name]
    torch.manual_seed(0)
    plain = network_of(model, shape)
    slow = replace(model, time_scale=0.25).build(shape, 3)
    slow.load_state_dict(plain.state_dict())
    x, t = inputs(shape)
    assert torch.equal(slow(x, t), plain(x, t / 4)) and not torch.allclose(slow(x, t), plain(x, t), rtol=1e-3)
