import pytest
import torch

from gentrain.domains.box import Box
from gentrain.methods.diffusion import Diffusion
from gentrain.methods.matching import noised
from gentrain.methods.mirror_flow import MirrorFlow
from gentrain.models.base import Condition
from gentrain.paths.dual import Dual
from gentrain.paths.inside import Inside
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.times import Uniform
from gentrain.paths.variance_preserving import VariancePreserving
from tests.methods.toy import TinyNetwork, batch_of, fall_of, nets_with, noise_of


def dual(**fields: float) -> Dual:
    return Dual(domain=Box(-1.0, 1.0), mean=[0.1, -0.2], std=[2.0, 3.0], **fields)


def test_data_are_noised_in_the_standardised_dual() -> None:
    x = Box(-1.0, 1.0).uniform(noise_of(64), (64, 2))
    sample = noised({"x": x}, noise_of(64), RectifiedFlow(space=dual()), Uniform(), 0.0)
    z = 1.25**0.5 * (Box(-1.0, 1.0).to_dual(x) - torch.tensor([0.1, -0.2])) / torch.tensor([2.0, 3.0])  # nu = 10
    torch.testing.assert_close(sample.x0, z)
    torch.testing.assert_close(sample.x_t, z + sample.t[:, None] * (sample.eps - z))


class Zero(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: Condition | None = None) -> torch.Tensor:
        return torch.zeros_like(x)


def test_loss_of_zero_velocity_is_that_of_prior_minus_dual_data() -> None:
    """E (eps - z)^2 = nu / (nu - 2) + E z^2, per coordinate."""
    count, path = 200_000, RectifiedFlow(space=dual(nu=12.0))
    x = Box(-1.0, 1.0).uniform(noise_of(count), (count, 2)) * 0.9
    loss = MirrorFlow().loss(nets_with(Zero(), path, "velocity"), {"x": x}, noise_of(count))
    expected = 1.2 + path.space.encode(x).square().mean().item()
    assert loss.value.item() == pytest.approx(expected, rel=0.01)
    assert loss.logs["dual_square"].item() == pytest.approx(expected - 1.2, rel=1e-5)


@pytest.mark.parametrize(
    "nu, weighting, weighted", [(3.0, "tails", True), (4.0, "tails", True), (3.0, "none", False), (4.5, "tails", False)]
)
def test_far_points_count_less_where_the_prior_has_no_fourth_moment(nu: float, weighting: str, weighted: bool) -> None:
    x, path = Box(-1.0, 1.0).uniform(noise_of(64), (64, 2)) * 0.9, RectifiedFlow(space=dual(nu=nu))
    loss = MirrorFlow(weighting=weighting).loss(nets_with(Zero(), path, "velocity"), {"x": x}, noise_of(64))
    sample = noised({"x": x}, noise_of(64), path, Uniform(), 0.1)
    x0, eps, t = (part.double() for part in (sample.x0, sample.eps, sample.t[:, None]))
    norm = ((1 - t) * x0 + t * eps).square().sum(1)
    weight = 2 * nu / (2 * nu + norm) if weighted else torch.ones_like(norm)
    assert loss.value.item() == pytest.approx((weight * (eps - x0).square().sum(1) / 2).mean().item(), rel=1e-5)
    assert sum(value.item() for name, value in loss.logs.items() if name.startswith("loss_")) == pytest.approx(loss.value.item(), rel=1e-5)


@pytest.mark.parametrize("method, path, prediction", [(MirrorFlow(), RectifiedFlow, "velocity"), (Diffusion(), VariancePreserving, "v")])
def test_flow_and_diffusion_learn_in_the_dual(method: MirrorFlow | Diffusion, path: type, prediction: str) -> None:
    space = Dual(domain=Box(-2.0, 2.0), mean=[0.0], std=[1.0], nu=float("inf"))
    assert fall_of(method, path(space=space), prediction) < 0.8


def test_updates_train_the_model_only() -> None:
    network = TinyNetwork()
    MirrorFlow().loss(
        nets_with(network, RectifiedFlow(space=dual()), "velocity"), {**batch_of(16), "x": batch_of(16)["x"] / 3}, noise_of(16)
    ).value.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())


@pytest.mark.parametrize("path", [RectifiedFlow(), RectifiedFlow(space=Inside(domain=Box())), VariancePreserving(space=dual())])
def test_other_paths_are_refused(path: RectifiedFlow | VariancePreserving) -> None:
    with pytest.raises(ValueError, match=r"set path\.space to dual"):
        MirrorFlow().check(path)
    MirrorFlow().check(RectifiedFlow(space=Dual()))
