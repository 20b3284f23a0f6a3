"""A ControlNet on the UNet of tiny pipelines: nothing changes at first, then it steers as diffusers' own pipeline would have it steer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gentrain.models.control import CONTROL, Form
from gentrain.models.pretrained import Pretrained
from tests.models.pipelines import dit, stable_diffusion, stable_diffusion_xl


def built(directory: Path, form: Form) -> tuple[Any, dict[str, Any]]:
    model = Pretrained(directory=str(directory))
    latent = (model.family.channels, 4, 4)
    network: Any = model.build(latent, 0)
    network.add_control(form)
    network.begin_control()
    null = {name: getattr(network, f"null_{name}").expand(2, *[-1] * (getattr(network, f"null_{name}").ndim - 1)) for name in network._null}
    return network.eval(), {**null, "null": torch.zeros(2, dtype=torch.bool)}


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
@pytest.mark.parametrize("channels", [1, 3])
def test_it_begins_without_effect_as_a_copy_and_learns(make: Callable[[Path], Path], channels: int, tmp_path: Path) -> None:
    directory = make(tmp_path / "pipeline")
    factor = Pretrained(directory=str(directory)).family.factor
    side = 4 * factor
    network, condition = built(directory, Form((channels, side, side)))
    x, t, control = torch.randn(2, 4, 4, 4), torch.tensor([300.0, 700.0]), torch.rand(2, channels, side, side)
    free = network(x, t, condition)
    torch.testing.assert_close(network(x, t, {**condition, CONTROL: control}), free, rtol=0, atol=1e-6)
    for name in ("conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"):
        assert torch.equal(network.control.net.get_parameter(name), network.backbone.get_parameter(name))
    network(x, t, {**condition, CONTROL: control}).square().sum().backward()
    assert network.control.net.controlnet_mid_block.weight.grad.abs().max() > 0
    with torch.no_grad():
        for parameter in network.control.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    steered = network(x, t, {**condition, CONTROL: control})
    assert (steered - free).abs().amax((1, 2, 3)).min() > 1e-4
    assert (network(x, t, {**condition, CONTROL: 1 - control}) - steered).abs().amax((1, 2, 3)).min() > 1e-5
    torch.testing.assert_close(network(x, t, condition), free, rtol=0, atol=0)


def test_what_takes_no_control_net_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not for a DiTPipeline"):
        built(dit(tmp_path / "dit"), Form((3, 8, 8)))
    with pytest.raises(ValueError, match="controls that are images"):
        built(stable_diffusion(tmp_path / "sd"), Form(classes=4))
