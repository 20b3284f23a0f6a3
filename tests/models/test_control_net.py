"""A ControlNet on the denoiser of tiny pipelines: nothing changes at first, then it steers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import pixel_unshuffle

from gentrain.models.control import CONTROL, Form
from gentrain.models.pretrained import Pretrained
from tests.models.pipelines import dit, flux, pixart_sigma, sana, stable_diffusion, stable_diffusion_3, stable_diffusion_xl

UNET = ("conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight")
COPIED = {
    "stable_diffusion": UNET,
    "stable_diffusion_xl": UNET,
    "stable_diffusion_3": ("pos_embed.proj.weight", "context_embedder.bias", "transformer_blocks.0.ff.net.2.weight"),
    "flux": ("x_embedder.weight", "transformer_blocks.0.ff.net.2.weight", "single_transformer_blocks.0.proj_out.weight"),
    "sana": ("patch_embed.proj.weight", "caption_norm.weight", "transformer_blocks.0.ff.conv_point.weight"),
}
MADE: dict[str, Callable[[Path], Path]] = {
    "stable_diffusion": stable_diffusion,
    "stable_diffusion_xl": stable_diffusion_xl,
    "stable_diffusion_3": stable_diffusion_3,
    "flux": lambda directory: flux(directory, levels=4, layers=5),  # one more than its ControlNet copies
    "sana": lambda directory: sana(directory, layers=2, timestep_scale=1.0),
}


def built(directory: Path, form: Form) -> tuple[Any, dict[str, Any]]:
    model = Pretrained(directory=str(directory))
    latent = (model.family.channels, 4, 4)
    network: Any = model.build(latent, 0)
    network.add_control(form)
    network.begin_control()
    null = {name: getattr(network, f"null_{name}").expand(2, *[-1] * (getattr(network, f"null_{name}").ndim - 1)) for name in network._null}
    return network.eval(), {**null, "null": torch.zeros(2, dtype=torch.bool)}


@pytest.mark.parametrize("family", COPIED)
@pytest.mark.parametrize("channels", [1, 3])
def test_it_begins_without_effect_as_a_copy_and_learns(family: str, channels: int, tmp_path: Path) -> None:
    directory = MADE[family](tmp_path / "pipeline")
    factor = Pretrained(directory=str(directory)).family.factor
    side = 4 * factor
    network, condition = built(directory, Form((channels, side, side)))
    x, t, control = torch.randn(2, 4, 4, 4), torch.tensor([300.0, 700.0]), torch.rand(2, channels, side, side)
    free = network(x, t, condition)
    torch.testing.assert_close(network(x, t, {**condition, CONTROL: control}), free, rtol=0, atol=0)
    for name in COPIED[family]:
        assert torch.equal(network.control.net.get_parameter(name), network.backbone.get_parameter(name))
    network(x, t, {**condition, CONTROL: control}).square().sum().backward()
    last = network.control.net.controlnet_mid_block if family in ("stable_diffusion", "stable_diffusion_xl") else None
    assert (last or network.control.net.controlnet_blocks[0]).weight.grad.abs().max() > 0
    with torch.no_grad():
        for parameter in network.control.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    steered = network(x, t, {**condition, CONTROL: control})
    assert (steered - free).abs().amax((1, 2, 3)).min() > 1e-4
    assert (network(x, t, {**condition, CONTROL: 1 - control}) - steered).abs().amax((1, 2, 3)).min() > 1e-5
    torch.testing.assert_close(network(x, t, condition), free, rtol=0, atol=0)


def test_flux_reads_the_image_in_minus_one_to_one_at_both_kinds_of_blocks(tmp_path: Path) -> None:
    network, condition = built(MADE["flux"](tmp_path / "pipeline"), Form((1, 32, 32)))
    with torch.no_grad():
        for parameter in network.control.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x, t, control = torch.randn(2, 4, 4, 4), torch.tensor([300.0, 700.0]), torch.rand(2, 1, 32, 32)
    told = network.family._told(x, t, condition)

    def drawn(image: torch.Tensor, alone: bool = False) -> torch.Tensor:
        double, single = network.control.net(controlnet_cond=image.expand(-1, 3, -1, -1), **told, return_dict=False)
        added = {"controlnet_block_samples": double, "controlnet_single_block_samples": None if alone else single}
        return network.backbone(**told, **added, controlnet_blocks_repeat=True, return_dict=False)[0]

    found = pixel_unshuffle(network(x, t, {**condition, CONTROL: control}), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, drawn(2 * control - 1), rtol=0, atol=1e-6)
    assert all((found - each).abs().max() > 1e-4 for each in (drawn(control), drawn(2 * control - 1, alone=True)))


@pytest.mark.parametrize("make", [dit, pixart_sigma])
def test_a_transformer_for_which_diffusers_has_none_gets_a_branch_of_our_own(make: Callable[[Path], Path], tmp_path: Path) -> None:
    network, condition = built(make(tmp_path / "pipeline"), Form((1, 8, 8)))
    if not condition.keys() - {"null"}:
        condition = {"label": torch.tensor([3, 5])}
    x, t, control = torch.randn(2, 4, 4, 4), torch.tensor([300.0, 700.0]), torch.rand(2, 1, 8, 8)
    free = network(x, t, condition)
    torch.testing.assert_close(network(x, t, {**condition, CONTROL: control}), free, rtol=0, atol=0)
    blocks = network.backbone.transformer_blocks
    assert torch.equal(network.control.blocks[0].ff.net[2].weight, blocks[0].ff.net[2].weight) and len(network.control.blocks) == 1
    with torch.no_grad():
        for parameter in network.control.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    steered = network(x, t, {**condition, CONTROL: control})
    assert (steered - free).abs().amax((1, 2, 3)).min() > 1e-4
    torch.testing.assert_close(network(x, t, condition), free, rtol=0, atol=0)
    other = control.clone()
    other[0] = 1 - other[0]
    changed = (network(x, t, {**condition, CONTROL: other}) - steered).abs().amax((1, 2, 3))
    assert changed[0] > 1e-5 and changed[1] == 0


def test_what_takes_no_control_net_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="knows no timestep_scale"):
        built(sana(tmp_path / "sana", layers=2), Form((3, 8, 8)))
    with pytest.raises(ValueError, match="shrinks its control by 8, latents of this pipeline are 2 times"):
        built(flux(tmp_path / "flux"), Form((3, 8, 8)))
    with pytest.raises(ValueError, match="takes controls of 1 or 3 channels, not of 4"):
        built(stable_diffusion_3(tmp_path / "sd3"), Form((4, 8, 8)))
    with pytest.raises(ValueError, match="controls that are images"):
        built(stable_diffusion(tmp_path / "sd"), Form(classes=4))
