"""Depth and segments, by tiny models of the real classes with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import interpolate

from gentrain.extractors.pretrained import Depth, Segmentation
from gentrain.models.control import Form

SIDE, MEAN, STD = 32, [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
IMAGES = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _told(directory: Path) -> Path:
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": SIDE, "width": SIDE}, "image_mean": MEAN, "image_std": STD})
    )
    return directory


@pytest.fixture(scope="module")
def dpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import DPTConfig, DPTForDepthEstimation

    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=SIDE, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("dpt")
    DPTForDepthEstimation(config).save_pretrained(directory)
    return _told(directory)


@pytest.fixture(scope="module")
def segformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("segformer")
    SegformerForSemanticSegmentation(config).save_pretrained(directory)
    return _told(directory)


def _given(images: torch.Tensor) -> torch.Tensor:
    """What the model's own image processor would make of them."""
    x = interpolate((images + 1) / 2, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return (x - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)


def test_depth_is_what_the_model_finds_from_0_to_1(dpt: Path) -> None:
    from transformers import DPTForDepthEstimation

    depth = Depth(directory=str(dpt))
    images = IMAGES.clone().requires_grad_()
    found = depth.read(images, {})
    assert found.shape == (2, 1, 24, 24) and depth.form((3, 24, 24)) == Form((1, 24, 24))
    model = DPTForDepthEstimation.from_pretrained(dpt).eval()
    expected = interpolate(model(pixel_values=_given(IMAGES)).predicted_depth[:, None], (24, 24), mode="bilinear", align_corners=False)
    low, high = expected.amin((1, 2, 3), keepdim=True), expected.amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(found, (expected - low) / (high - low + 1e-6), rtol=1e-4, atol=1e-5)
    control = depth.read(IMAGES.flip(3), {}).detach()
    depth.loss(control, images, {}).sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and images.grad.abs().max() > 0
    assert depth.error(found.detach(), IMAGES, {}).max() < 1e-6


def test_segments_are_the_likeliest_classes_and_the_loss_is_their_cross_entropy(segformer: Path) -> None:
    from torch.nn.functional import cross_entropy
    from transformers import SegformerForSemanticSegmentation

    segmentation = Segmentation(directory=str(segformer))
    assert segmentation.form((3, 24, 24)) == Form((3, 24, 24))
    control = segmentation.read(IMAGES, {})
    assert control.shape == (2, 3, 24, 24) and torch.equal(control.sum(1), torch.ones(2, 24, 24))
    model = SegformerForSemanticSegmentation.from_pretrained(segformer).eval()
    logits = interpolate(model(pixel_values=_given(IMAGES)).logits, (24, 24), mode="bilinear", align_corners=False)
    assert (control.argmax(1) == logits.argmax(1)).float().mean() > 0.999
    asked, images = control.flip(3), IMAGES.clone().requires_grad_()
    loss = segmentation.loss(asked, images, {})
    torch.testing.assert_close(loss, cross_entropy(logits, asked.argmax(1), reduction="none").sum((1, 2)), rtol=1e-4, atol=1e-2)
    loss.sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0
    wrong = (control.argmax(1) != asked.argmax(1)).float().mean((1, 2))
    torch.testing.assert_close(segmentation.error(asked, IMAGES, {}), wrong)


def test_a_directory_that_holds_no_such_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        Depth(directory=str(tmp_path)).read(IMAGES, {})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no classes"):
        Segmentation(directory=str(tmp_path)).form((3, 8, 8))
