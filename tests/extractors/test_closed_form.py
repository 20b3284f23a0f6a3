"""Controls that are formulas: against plain computations in float64, with gradients that are right and finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gentrain.config import ConfigError
from gentrain.data.digits import Digits
from gentrain.data.latents import Latents
from gentrain.extractors.base import Extractor, condition_loss
from gentrain.extractors.closed_form import DownSampling, GreyScale, Signs, SoftEdges
from gentrain.extractors.label import Label
from gentrain.models.control import Form
from gentrain.models.unet import UNet
from gentrain.training.roles import _add_control

COLOUR = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_down_sampling_is_the_mean_of_each_block_at_each_of_its_pixels() -> None:
    control = DownSampling(factor=4).read(COLOUR, {})
    assert control.shape == COLOUR.shape and DownSampling(factor=4).form((3, 8, 8)) == Form((3, 8, 8))
    for row in (0, 4):
        for column in (0, 4):
            block = slice(row, row + 4), slice(column, column + 4)
            mean = COLOUR[:, :, *block].mean((2, 3))
            torch.testing.assert_close(control[:, :, *block], (mean[:, :, None, None].expand(-1, -1, 4, 4) + 1) / 2)
    torch.testing.assert_close(DownSampling(factor=4).read(2 * control - 1, {}), control)  # what it shows of itself


def test_grey_scale_is_luma() -> None:
    red = torch.tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
    torch.testing.assert_close(GreyScale().read(red, {}), torch.full((1, 1, 2, 2), 0.299))
    assert GreyScale().form((3, 8, 8)) == Form((1, 8, 8))


def test_soft_edges_are_where_the_image_steps() -> None:
    image = -torch.ones(1, 1, 7, 8)
    image[..., 4:] = 1
    edges = SoftEdges(softness=0.25).read(image, {})
    # Sobel's slope of a step from 0 to 1 is 1 on both of its sides
    torch.testing.assert_close(edges[0, 0, :, 3:5], torch.full((7, 2), 0.8))
    assert edges[0, 0, :, :2].max() < 0.005 and edges[0, 0, :, 6:].max() < 0.005
    torch.testing.assert_close(SoftEdges().read(image.mT, {}), SoftEdges().read(image, {}).mT)  # both directions alike
    torch.testing.assert_close(SoftEdges().read(-image, {}), SoftEdges().read(image, {}))


@pytest.mark.parametrize("extractor", [DownSampling(factor=2), GreyScale(), SoftEdges()])
def test_the_loss_of_a_map_is_a_normal_law_s_and_its_gradient_is_the_numerical_one(extractor: Any) -> None:
    control = extractor.read(COLOUR.flip(3), {})
    loss = extractor.loss(control, COLOUR, {})
    torch.testing.assert_close(loss, condition_loss(control, extractor.read(COLOUR, {}), extractor.deviation))
    assert loss.shape == (2,) and (loss > 0).all()
    assert extractor.loss(extractor.read(COLOUR, {}), COLOUR, {}).abs().max() == 0
    x = COLOUR[:, :, :4, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: extractor.loss(extractor.read(COLOUR[:, :, 4:, 4:], {}), x, {}), x)
    flat = torch.zeros(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    extractor.read(flat, {}).sum().backward()
    assert flat.grad.isfinite().all()


def test_signs_are_independent_coins() -> None:
    x = torch.tensor([[0.2, -0.3], [-0.1, 0.05]], dtype=torch.float64, requires_grad=True)
    signs = Signs(softness=0.1)
    asked = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    log_p = ((asked * x) / 0.1).sigmoid().log().sum(1)
    torch.testing.assert_close(signs.loss(asked, x, {}), -log_p)
    assert signs.read(x, {}).tolist() == [[1, -1], [-1, 1]]
    assert signs.error(asked, x, {}).tolist() == [1, 0]
    signs.loss(asked, x, {}).sum().backward()
    assert ((x.grad * asked) < 0).all()  # descent goes to the side that is asked for


def test_the_label_is_what_the_judge_finds() -> None:
    def judge(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)

    x = torch.tensor([[0.1, 0.9, 0.2], [0.7, 0.0, -5.0]], dtype=torch.float64, requires_grad=True)
    label: Extractor = Label()
    asked = torch.tensor([1, 2])
    loss = label.loss(asked, x, {"judge": judge})
    expected = -x.clamp(-1, 1).float().log_softmax(1)[torch.arange(2), asked]
    torch.testing.assert_close(loss, expected)
    assert label.read(x, {"judge": judge}).tolist() == [1, 0] and label.error(asked, x, {"judge": judge}).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("extractor", "key", "message"),
    [(DownSampling(factor=3), "method.control.factor", "8x8 pixels are no multiples"), (GreyScale(), "method.control", "grey themselves")],
)
def test_of_latents_it_is_the_decoded_shape_that_counts(extractor: Extractor, key: str, message: str) -> None:
    """Which is known once their decoder is there."""
    with pytest.raises((ConfigError, ValueError), match=message):
        extractor.check_data(Digits())
    extractor.check_data(Latents("nowhere"))
    network = UNet(channels=(8,), attention=(), norm_groups=4).build((4, 4, 4), 0)
    with pytest.raises(ConfigError, match=message) as caught:
        _add_control(network, extractor, (1, 8, 8), UNet())
    assert caught.value.key == key
    _add_control(network, extractor, (3, 12, 12), UNet())
