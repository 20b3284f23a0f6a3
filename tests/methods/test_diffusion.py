import copy

import pytest
import torch

from gentrain.config import ConfigError, Document, build
from gentrain.methods.base import Clock, Method
from gentrain.methods.diffusion import Diffusion, denoising_loss, edm_weight, min_snr_weight
from gentrain.methods.matching import noised
from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.times import Discrete, LogNormal, Uniform
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.paths.variance_preserving import VariancePreserving
from tests.methods.toy import TinyNetwork, batch_of, fall_of, nets_with, noise_of


def test_denoising_loss_is_the_weighted_mean_squared_error_of_each_row() -> None:
    predicted, target = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]]), torch.tensor([[[0.0, 0.0]], [[3.0, 1.0]]])
    assert denoising_loss(predicted, target, torch.tensor([2.0, 0.5])).tolist() == [5.0, 2.5]


def test_edm_weight_is_that_of_the_paper() -> None:
    sigma, data = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0], dtype=torch.float64), 0.7
    torch.testing.assert_close(edm_weight(-2 * sigma.log(), data), (sigma**2 + data**2) / (sigma * data) ** 2)


def test_min_snr_weight_stops_at_gamma() -> None:
    snr = torch.tensor([0.01, 1.0, 5.0, 1e4, float("inf")])
    torch.testing.assert_close(min_snr_weight(snr.log(), 5.0), torch.tensor([0.01, 1.0, 5.0, 5.0, 5.0]))


def test_uniform_weighting_of_an_eps_network_is_the_simple_loss_of_ddpm() -> None:
    network, path, method = TinyNetwork(), VariancePreserving(), Diffusion(times=Discrete(), label_dropout=0.0)
    loss = method.loss(nets_with(network, path, "eps"), batch_of(32), noise_of(32)).value
    sample = noised(batch_of(32), noise_of(32), path, Discrete(), 0.0)
    assert torch.equal(sample.t, sample.t.round())
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[sample.t.long()][:, None].float()
    x_t = alpha_bar.sqrt() * sample.x0 + (1 - alpha_bar).sqrt() * sample.eps
    torch.testing.assert_close(loss, (network(x_t, sample.t, {"label": batch_of(32)["label"]}) - sample.eps).square().mean())


@pytest.mark.parametrize("path", [VarianceExploding(sigma_data=0.6), RectifiedFlow(), VariancePreserving()])
def test_edm_weighting_of_x0_is_the_plain_loss_of_an_edm_network(path: Path) -> None:
    """EDM chose its weight so: lambda c_out^2 = 1."""
    nets = nets_with(TinyNetwork(), path, "edm")
    losses = [
        Diffusion(times=LogNormal(), weighting=weighting).loss(nets, batch_of(256), noise_of(256)) for weighting in ("edm", "uniform")
    ]
    torch.testing.assert_close(losses[0].value, losses[1].value, rtol=1e-3, atol=0)


def test_min_snr_weighting_is_the_weighted_eps_loss_of_the_paper() -> None:
    """min(SNR, gamma) / SNR times the squared error of eps (arXiv:2303.09556, section 3.4)."""
    network, path, times = TinyNetwork(), VariancePreserving(), Discrete()
    loss = Diffusion(times=times, weighting="min_snr", gamma=3.0, label_dropout=0.0).loss(
        nets_with(network, path, "eps"), batch_of(256), noise_of(256)
    )
    sample = noised(batch_of(256), noise_of(256), path, times, 0.0)
    error = (network(sample.x_t, sample.t, sample.condition) - sample.eps).square().mean(1)
    snr = path.log_snr(sample.t).exp()
    torch.testing.assert_close(loss.value, (error * snr.clamp(max=3.0) / snr).mean(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("weighting", ["uniform", "edm", "min_snr"])
@pytest.mark.parametrize(("path", "prediction"), [(VariancePreserving(), "eps"), (VarianceExploding(), "edm"), (RectifiedFlow(), "v")])
def test_loss_falls(path: Path, prediction: str, weighting: str) -> None:
    assert fall_of(Diffusion(times=LogNormal(), weighting=weighting), path, prediction) < 0.8


def test_loss_of_a_batch_is_the_mean_of_its_parts() -> None:
    nets, method = nets_with(TinyNetwork(), VariancePreserving(), "v"), Diffusion(weighting="min_snr")
    whole = method.loss(nets, batch_of(64), noise_of(64))
    parts = [method.loss(nets, batch_of(32, start), noise_of(32, start)) for start in (0, 32)]
    torch.testing.assert_close(whole.value, (parts[0].value + parts[1].value) / 2)
    torch.testing.assert_close(sum(whole.logs.values()), whole.value.detach())


def test_update_trains_the_model_only_and_leaves_its_inputs_alone() -> None:
    network, batch = TinyNetwork(), batch_of(16)
    before = copy.deepcopy(batch)
    (update,) = Diffusion().updates(Clock(0, 16, 160))
    assert update.role == Diffusion.generator == "model" and Diffusion.roles["model"].ema
    update.losses[0](nets_with(network, VariancePreserving(), "eps"), batch, noise_of(16)).value.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())
    assert all(torch.equal(batch[key], before[key]) for key in batch)


@pytest.mark.parametrize("weighting", ["uniform", "edm", "min_snr"])
def test_ends_of_the_path_give_a_finite_loss(weighting: str) -> None:
    class Ends(Uniform):
        def sample(self, uniform: torch.Tensor, path: Path) -> torch.Tensor:
            return torch.where(uniform < 0.5, path.t_min, path.t_max)

    for path in (RectifiedFlow(), VarianceExploding(), VariancePreserving()):
        for prediction in ("x0", "eps", "v", "velocity", "edm"):
            nets = nets_with(TinyNetwork(), path, prediction)
            assert Diffusion(times=Ends(), weighting=weighting).loss(nets, batch_of(8), noise_of(8)).value.isfinite(), (path, prediction)


def test_is_configured_by_name() -> None:
    method = build(Method, Document({"name": "diffusion", "weighting": "min_snr", "times": {"name": "discrete"}}, "x.yaml"))
    assert method == Diffusion(weighting="min_snr", times=Discrete())
    with pytest.raises(ConfigError, match="weighting"):
        build(Method, Document({"name": "diffusion", "weighting": "snr"}, "x.yaml"))
