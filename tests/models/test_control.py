"""Branches for controls: nothing changes until they learn, then the control reaches the output, and the network below stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gentrain.models.base import Model
from gentrain.models.control import CONTROL, Form
from gentrain.models.dit import DiT
from gentrain.models.mlp import MLP
from gentrain.models.unet import UNet

IMAGE = (1, 8, 8)
CASES: dict[str, tuple[Model, tuple[int, ...], Form]] = {
    "mlp, vector": (MLP(width=16, depth=2), (3,), Form((3,))),
    "mlp, class": (MLP(width=16, depth=2), (3,), Form(classes=4)),
    "unet, image": (UNet(channels=(8, 16), attention=(1,), attention_head_dim=8, norm_groups=4, space_to_depth=2), IMAGE, Form((2, 8, 8))),
    "unet, class": (UNet(channels=(8, 16), attention=(), norm_groups=4), IMAGE, Form(classes=4)),
    "dit, image": (DiT(layers=3, heads=2, head_dim=8), IMAGE, Form((2, 8, 8))),
    "dit, class": (DiT(layers=3, heads=2, head_dim=8), IMAGE, Form(classes=4)),
}


def controls(form: Form, count: int) -> Tensor:
    return torch.arange(count) % form.classes if form.classes else torch.randn(count, *form.shape)


def randomised(module: nn.Module) -> None:
    """What begins as zeros hides what lies behind it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def built(case: str, classes: int = 0) -> tuple[Any, Tensor, Tensor, Tensor]:
    model, shape, form = CASES[case]
    torch.manual_seed(0)
    network: Any = model.build(shape, classes)
    randomised(network)
    network.add_control(form)
    network.begin_control()
    return network, torch.randn(5, *shape), torch.rand(5) * 1000, controls(form, 5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("classes", [0, 3])
def test_at_first_the_network_is_what_it_was_with_and_without_a_control(case: str, classes: int) -> None:
    network, x, t, control = built(case, classes)
    known = {"label": torch.arange(5) % 3 - 1} if classes else {}
    torch.testing.assert_close(network(x, t, {**known, CONTROL: control}), network(x, t, known or None), rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_what_has_learnt_obeys_the_control_of_each_row(case: str) -> None:
    network, x, t, control = built(case)
    randomised(network.control)
    free, steered = network(x, t), network(x, t, {CONTROL: control})
    assert (free - steered).flatten(1).abs().amax(1).min() > 1e-3
    order = torch.tensor([1, 0, 2, 3, 4])
    swapped = network(x, t, {CONTROL: control[order]})
    assert (swapped - steered).flatten(1).abs().amax(1)[:2].min() > 1e-4
    torch.testing.assert_close(swapped[2:], steered[2:], rtol=0, atol=1e-6)
    torch.testing.assert_close(network(x, t), free, rtol=0, atol=0)  # nothing is left of a call with a control


@pytest.mark.parametrize("case", CASES)
def test_every_weight_of_the_branch_gets_a_gradient_once_it_is_not_zero(case: str) -> None:
    network, x, t, control = built(case)
    network(x, t, {CONTROL: control}).square().sum().backward()
    first = {name for name, p in network.control.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert first and all("zero" in name for name in first)  # the layers that are zero learn in the first step, the others after it
    randomised(network.control)
    network.zero_grad()
    network(x, t, {CONTROL: control}).square().sum().backward()
    silent = [name for name, p in network.control.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    # a query's bias moves all scores alike, the last block's label embedding is read by nothing here
    assert [name for name in silent if not name.endswith(("to_k.bias",)) and "class_embedder" not in name] == []


@pytest.mark.parametrize("case", CASES)
def test_the_branch_begins_as_a_copy_of_the_weights_that_came_after_it(case: str) -> None:
    network, *_ = built(case)
    randomised(network)  # as weights that are loaded
    network.begin_control()
    below = dict(network.named_parameters())
    copied = {
        "mlp": [("layers.1.2.weight", "control.layers.1.2.weight"), ("input.weight", "control.input.weight")],
        "unet": [
            ("backbone.down_blocks.1.resnets.0.conv1.weight", "control.down_blocks.1.resnets.0.conv1.weight"),
            ("backbone.conv_in.bias", "control.conv_in.bias"),
            ("backbone.mid_block.resnets.1.conv2.weight", "control.mid_block.resnets.1.conv2.weight"),
        ],
        "dit": [("backbone.transformer_blocks.1.ff.net.2.weight", "control.blocks.1.ff.net.2.weight")],
    }[case.partition(",")[0]]
    for theirs, ours in copied:
        assert torch.equal(below[theirs], below[ours])


@pytest.mark.parametrize("case", ["dit, image", "dit, class"])
def test_each_copy_of_a_block_reads_the_copy_before_it(case: str) -> None:
    """PixArt-delta's ControlNet-Transformer, written out block by block."""
    network, x, t, control = built(case)
    randomised(network.control)
    dit, branch, told = network.backbone, network.control, {"timestep": t, "class_labels": torch.zeros(5, dtype=torch.int64)}
    hint = branch.hint(control)
    hint = hint.flatten(2).transpose(1, 2) if hint.ndim == 4 else hint[:, None]
    hidden = dit.pos_embed(x)
    seen = hidden + hint
    for index, block in enumerate(dit.transformer_blocks):
        hidden = block(hidden, **told)
        if index < len(branch.blocks):
            seen = branch.blocks[index](seen, **told)
            hidden = hidden + branch.zeros[index](seen)
    found: list[Tensor] = []
    handle = dit.norm_out.register_forward_pre_hook(lambda module, given: found.append(given[0]))
    network(x, t, {CONTROL: control})
    handle.remove()
    torch.testing.assert_close(found[0], hidden, rtol=0, atol=1e-5)


def test_a_control_that_does_not_lie_on_the_grid_is_refused() -> None:
    network: Any = CASES["unet, class"][0].build(IMAGE, 0)
    with pytest.raises(ValueError, match="12x12 does not lie on a grid of 8x8"):
        network.add_control(Form((1, 12, 12)))
    with pytest.raises(ValueError, match="for networks on images"):
        MLP().build((2,), 0).add_control(Form((1, 4, 4)))
