import pytest
import torch

from gentrain.config import ConfigError, Document, build
from gentrain.domains.ball import Ball
from gentrain.domains.box import Box
from gentrain.methods.base import Method
from gentrain.methods.matching import noised
from gentrain.methods.reflected_diffusion import ReflectedDiffusion, constrained_score_loss
from gentrain.models.base import Condition
from gentrain.paths.inside import Inside
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.reflected_heat import ReflectedHeat
from gentrain.paths.space import Free
from gentrain.paths.times import Uniform
from gentrain.training.run import parse_run
from tests.methods.toy import TinyNetwork, batch_of, fall_of, nets_with, noise_of

PATH = ReflectedHeat(space=Inside(domain=Box(-1.0, 1.0)))


def test_loss_is_half_sigma_squared_times_the_mean_squared_error() -> None:
    loss = constrained_score_loss(
        torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]]), torch.tensor([[[0.0, 0.0]], [[3.0, 1.0]]]), torch.tensor([2.0, 1.0])
    )
    assert loss.tolist() == [0.5 * 4 * 2.5, 0.5 * 5.0]


class PointScore(torch.nn.Module):
    """-sigma times the score of all data at one point, times a factor."""

    def __init__(self, point: torch.Tensor):
        super().__init__()
        self.point, self.factor = point, torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: Condition | None = None) -> torch.Tensor:
        sigma = PATH.sigma(t / 1000)[:, None]
        eps = -self.factor * sigma * PATH.box.heat_kernel_score(x, self.point.expand_as(x), sigma)
        return eps / PATH.eps_scale(t / 1000)[:, None]


def test_the_kernels_score_is_the_optimum_for_data_at_one_point() -> None:
    point, count = torch.tensor([0.9, -0.4]), 20_000
    batch = {"x": point.expand(count, 2), "label": torch.zeros(count, dtype=torch.int64)}
    network = PointScore(point)
    assert ReflectedDiffusion().loss(nets_with(network, PATH, "eps"), batch, noise_of(count)).value < 1e-6
    with torch.no_grad():
        network.factor.fill_(0.0)
    assert ReflectedDiffusion().loss(nets_with(network, PATH, "eps"), batch, noise_of(count)).value > 0.1


class Outwards(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: Condition | None = None) -> torch.Tensor:
        return self.factor * x


def test_zero_is_the_best_multiple_of_a_score_for_uniform_data() -> None:
    """The score of the uniform law is 0 at every time; the walls reflect."""
    count = 100_000
    batch = {"x": PATH.box.uniform(noise_of(count, count), (count, 2))}
    network = Outwards()
    ReflectedDiffusion().loss(nets_with(network, PATH, "eps"), batch, noise_of(count)).value.backward()
    assert network.factor.grad.abs() < 0.01


def test_likelihood_weighting_is_the_bounds_integrand() -> None:
    """g^2 / sigma^2 = 2 log(sigma_max / sigma_min)."""
    nets, batch = nets_with(TinyNetwork(), PATH, "eps"), batch_of(64)
    variance = ReflectedDiffusion().loss(nets, batch, noise_of(64))
    likelihood = ReflectedDiffusion(weighting="likelihood").loss(nets, batch, noise_of(64))
    assert likelihood.value.item() == pytest.approx(2 * PATH.log_range * variance.value.item(), rel=1e-6)
    assert variance.logs["bound"].item() == pytest.approx(likelihood.value.item(), rel=1e-6)
    information = ReflectedDiffusion(weighting="information").loss(nets, batch, noise_of(64))
    assert information.logs["bound"].item() == pytest.approx(likelihood.value.item(), rel=1e-6)
    assert not variance.logs["bound"].requires_grad


def test_information_weighting_is_the_networks_own_error() -> None:
    """Half the mean square of what it puts out against the kernel's score times -sigma / eps_scale, at every level alike."""
    nets, batch = nets_with(TinyNetwork(), PATH, "eps"), batch_of(64)
    sample = noised(batch, noise_of(64), PATH, Uniform(), 0.2)
    sigma, scale = PATH.sigma(sample.t)[:, None], PATH.eps_scale(sample.t)[:, None]
    target = -sigma * PATH.box.heat_kernel_score(sample.x_t, sample.x0, sigma) / scale
    error = nets.model.raw(sample.x_t, sample.t, sample.condition) - target
    loss = ReflectedDiffusion(weighting="information").loss(nets, batch, noise_of(64)).value
    torch.testing.assert_close(loss, error.square().mean() / 2, rtol=1e-4, atol=0)


def test_dropped_labels_are_the_null_token_and_not_class_zero() -> None:
    network = TinyNetwork()
    ReflectedDiffusion(label_dropout=1.0).loss(nets_with(network, PATH, "eps"), batch_of(8), noise_of(8))
    assert (network.seen[-1] == -1).all()
    ReflectedDiffusion(label_dropout=0.0).loss(nets_with(network, PATH, "eps"), batch_of(8), noise_of(8))
    assert torch.equal(network.seen[-1], batch_of(8)["label"])


def test_loss_falls() -> None:
    assert fall_of(ReflectedDiffusion(), PATH, "eps") < 0.93  # 0.89: most of the loss is the kernel's own variance


def test_a_path_without_its_kernel_is_refused_as_the_configuration_loads() -> None:
    method = build(Method, Document({"name": "reflected_diffusion"}, "x.yaml"))
    method.check(PATH)
    with pytest.raises(ValueError, match="needs the path reflected_heat, not rectified_flow"):
        method.check(RectifiedFlow())
    with pytest.raises(ValueError, match="on boxes only"):
        method.check(ReflectedHeat(space=Inside(domain=Ball())))
    with pytest.raises(ValueError, match="on boxes only"):
        method.check(ReflectedHeat(space=Free()))
    settings = {"method": "reflected_diffusion", "data": "checkerboard", "model": "mlp", "training": {"samples": 10}}
    with pytest.raises(ConfigError, match=r"x\.yaml: path: reflected_diffusion needs"):
        parse_run(Document(settings, "x.yaml"))
