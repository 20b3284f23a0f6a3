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
    z = (Box(-1.0, 1.0).to_dual(x) - torch.tensor([0.1, -0.2])) / torch.tensor([2.0, 3.0])
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
