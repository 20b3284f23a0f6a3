"""The autoencoder with a codebook: its three errors and where their gradients go, the nearest codes, and images to tokens and back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from gentrain.data.toys import Rings
from gentrain.methods.base import Clock
from gentrain.methods.vq_autoencoder import VQAutoencoder
from gentrain.models.vq import VQ, VQNetwork, load_vq, quantization_errors, save_vq, squared_distances, unpack

SHAPE = (1, 8, 8)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network_of(scales: tuple[int, ...] = (), codes: int = 16) -> VQNetwork:
    torch.manual_seed(0)
    network: Any = VQ(channels=(8, 8), codes=codes, code_dim=3, scales=scales, norm_groups=4).build(SHAPE, 0)
    return network.double()


def loss_of(method: VQAutoencoder, network: Any, x: Tensor) -> Any:
    (update,) = method.updates(Clock(0, len(x), 100))
    (function,) = update.losses  # type: ignore[union-attr]
    return function(SimpleNamespace(autoencoder=network), {"x": x}, None)


def test_each_error_moves_what_it_should_and_by_its_formula() -> None:
    """In float64: d/d approximations = 2 (a - z) / (K N D) of the first alone, d/d latent = 2 sum_k (z - a_k) / (K N D) of the second."""
    latent, approximations, nearest = (drawn(*shape, seed=n).requires_grad_() for n, shape in enumerate([(2, 4, 3), (2, 2, 4, 3), (2, 5)]))
    codebook, commitment, idle = quantization_errors(latent, approximations, nearest).unbind(1)
    change = (approximations - latent[:, None]).detach()
    torch.testing.assert_close(codebook, change.square().mean((1, 2, 3)))
    torch.testing.assert_close(commitment, codebook)
    torch.testing.assert_close(idle, nearest.mean(1))
    inputs = [latent, approximations, nearest]
    expected = [[None, 2 * change / 24, None], [-2 * change.sum(1) / 24, None, None], [None, None, torch.full_like(nearest, 1 / 5)]]
    for value, wanted in zip((codebook, commitment, idle), expected, strict=True):
        for found, each in zip(torch.autograd.grad(value.sum(), inputs, retain_graph=True, allow_unused=True), wanted, strict=True):
            assert (each is None and (found is None or not found.any())) or torch.allclose(found, each, rtol=1e-12)


@pytest.mark.parametrize("commitment, idle", [(0.25, 0.01), (0.0, 0.0), (2.0, 3.0)])
def test_the_loss_is_the_mean_of_its_weighed_terms(commitment: float, idle: float) -> None:
    x, image, errors = drawn(4, *SHAPE, seed=1), drawn(4, 64, seed=2).requires_grad_(), drawn(4, 3, seed=3).square().requires_grad_()
    found = loss_of(VQAutoencoder(commitment=commitment, idle=idle), lambda x: torch.cat([image, errors], 1), x)
    expected = (image - x.flatten(1)).abs().mean() + (errors * torch.tensor([1, commitment, idle], dtype=torch.float64)).sum(1).mean()
    torch.testing.assert_close(found.value, expected, rtol=1e-12, atol=1e-12)
    assert not any(value.requires_grad for value in found.logs.values())
    assert found.logs["quantization"].item() == pytest.approx(errors[:, 0].mean().item())


def test_one_scale_is_diffusers_vq_model() -> None:
    network, x = network_of(), drawn(5, *SHAPE).tanh()
    model = network.model
    with torch.no_grad():
        latent = model.encode(x, return_dict=False)[0]
        quantized, _, (_, _, indices) = model.quantize(latent)
        torch.testing.assert_close(unpack(network(x), SHAPE).image, model.decode(latent, return_dict=False)[0])
    assert torch.equal(network.encode(x), indices.reshape(5, -1)) and indices.unique().numel() > 4
    torch.testing.assert_close(network.decode(network.encode(x)), model.decode(latent, return_dict=False)[0].clamp(-1, 1))
    error = (quantized - latent).square().flatten(1).mean(1)
    torch.testing.assert_close(unpack(network(x), SHAPE).codebook, error)


def test_distances_are_exact_and_hold_no_differences() -> None:
    """No tensor of [B, N, V, D] is kept for the gradient, which flows to the codes alone."""
    vectors, codes, sizes = drawn(2, 5, 16), drawn(7, 16, seed=1).requires_grad_(), []

    def seen(kept: Tensor) -> Tensor:
        sizes.append(kept.numel())
        return kept

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda kept: kept):
        found = squared_distances(vectors, codes)
    assert max(sizes) < 2 * 5 * 7 * 16
    expected = (vectors[:, :, None] - codes).square().sum(3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = drawn(2, 5, 7, seed=2)
    one, other = (torch.autograd.grad((each * weights).sum(), codes)[0] for each in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert (squared_distances(vectors.float() + 1e4, vectors[0].float() + 1e4) >= 0).all()
    with torch.autocast("cpu", torch.bfloat16):
        again = squared_distances(vectors.float(), codes.float())
    torch.testing.assert_close(again, expected.float(), rtol=1e-5, atol=1e-5)


def test_codes_of_a_scale_stand_for_what_smaller_ones_leave() -> None:
    """Algorithm 1 of the paper, with torch's interpolation and one place at a time."""
    network, x = network_of((1, 2, 4)), drawn(3, *SHAPE).tanh()
    codebook, found = network.codebook, network.encode(x).split([1, 4, 16], 1)
    left = network.latent(x).transpose(1, 2).unflatten(2, (4, 4))
    total = torch.zeros_like(left)
    for side, tokens in zip((1, 2, 4), found, strict=True):
        wanted = adaptive_avg_pool2d(left, side).flatten(2).transpose(1, 2)
        assert torch.equal(tokens, torch.cdist(wanted, codebook.expand(3, -1, -1)).argmin(2))
        codes = interpolate(codebook[tokens].transpose(1, 2).unflatten(2, (side, side)), size=(4, 4), mode="bilinear")
        left, total = left - codes, total + codes
    torch.testing.assert_close(network.decode(torch.cat(found, 1)), network.model.decode(
        total, force_not_quantize=True, return_dict=False)[0].clamp(-1, 1), rtol=1e-5, atol=1e-5)  # fmt: skip


def test_the_gradient_of_the_image_passes_straight_to_the_encoder() -> None:
    network, x = network_of(), drawn(4, *SHAPE).tanh()
    network.zero_grad()
    unpack(network(x), SHAPE).image.square().mean().backward()
    found = network.model.quant_conv.weight.grad.clone()
    assert network.model.quantize.embedding.weight.grad is None or not network.model.quantize.embedding.weight.grad.any()
    latent = network.model.encode(x, return_dict=False)[0]
    stand_in = network.model.quantize(latent)[0].detach().requires_grad_()
    network.model.decode(stand_in, force_not_quantize=True, return_dict=False)[0].square().mean().backward()
    network.zero_grad()
    latent.backward(stand_in.grad)
    torch.testing.assert_close(found, network.model.quant_conv.weight.grad)


@pytest.mark.parametrize("scales", [(), (1, 2, 4)])
def test_idle_codes_come_nearer_and_nothing_else_moves_by_it(scales: tuple[int, ...]) -> None:
    network, x = network_of(scales, codes=6), drawn(4, *SHAPE).tanh()
    with torch.no_grad():
        network.model.quantize.embedding.weight[0] = 50.0  # nearest to nothing
    assert not (network.encode(x) == 0).any()
    unpack(network(x), SHAPE).idle.mean().backward()
    gradient = network.model.quantize.embedding.weight.grad
    assert (gradient[0] > 1).all()
    others = [p.grad for name, p in network.named_parameters() if "embedding" not in name]
    assert all(each is None or not each.any() for each in others)
    network.zero_grad()
    quantized = unpack(network(x), SHAPE)
    (quantized.image.mean() + quantized.codebook.mean() + quantized.commitment.mean()).backward()
    assert not network.model.quantize.embedding.weight.grad[0].any()  # without it nothing would


def test_training_brings_images_back() -> None:
    network = network_of().float()
    x = (drawn(64, 1, 2, 2).sign() * torch.ones(1, 1, 1, 1)).repeat_interleave(4, 2).repeat_interleave(4, 3).float()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    first = None
    for _ in range(60):
        found = loss_of(VQAutoencoder(), network, x)
        first = found.logs["reconstruction"].item() if first is None else first
        optimizer.zero_grad()
        found.value.backward()
        optimizer.step()
    assert (network.decode(network.encode(x)) - x).abs().mean() < 0.4 * first


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    network, x = network_of((1, 4)).float(), drawn(2, *SHAPE).float()
    save_vq(network, tmp_path / "vq")
    loaded = load_vq(tmp_path / "vq")
    tokens = network.encode(x)
    assert torch.equal(loaded.encode(x), tokens) and torch.equal(loaded.decode(tokens), network.decode(tokens))
    (tmp_path / "vq" / "scales.json").unlink()
    with pytest.raises(ValueError, match="tokenize the images again"):
        load_vq(tmp_path / "vq")


@pytest.mark.parametrize("settings, shape, message", [
    ({}, (1, 8, 6), "square images"), ({}, (2,), "square images"), ({}, (1, 7, 7), "not divisible by 4"),
    ({"scales": (1, 3)}, SHAPE, r"must grow and end with 2"), ({"scales": (2, 1, 2)}, SHAPE, r"must grow"),
])  # fmt: skip
def test_images_that_do_not_fit_are_refused(settings: dict[str, Any], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQ(**settings).build(shape, 0)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="channels is empty"):
        VQ(channels=())
    with pytest.raises(ValueError, match="not divisible by norm_groups"):
        VQ(channels=(12,))
    with pytest.raises(ValueError, match="is for images"):
        VQAutoencoder().check_data(Rings())
