import pytest
import torch

from gentrain.domains.ball import Ball
from gentrain.domains.box import Box
from gentrain.methods.flow_matching import FlowMatching
from gentrain.methods.matching import noised
from gentrain.methods.reflected_flow import ReflectedFlow
from gentrain.paths.inside import Inside
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.times import Uniform
from gentrain.paths.trigflow import TrigFlow
from tests.methods.toy import TinyNetwork, batch_of, fall_of, nets_with, noise_of


def path_on(domain: Ball | Box) -> RectifiedFlow:
    return RectifiedFlow(space=Inside(domain=domain))


@pytest.mark.parametrize("domain", [Box(-1.0, 1.0), Ball(1.5)])
def test_lines_between_points_of_the_set_stay_in_it(domain: Ball | Box) -> None:
    x = domain.uniform(noise_of(5000), (5000, 2))
    sample = noised({"x": x}, noise_of(5000), path_on(domain), Uniform(), 0.0)
    assert domain.contains(sample.eps).all() and domain.contains(sample.x_t).all()
    assert sample.eps.std() < 1.0 and sample.eps.abs().max() > 0.9  # uniform, not normal


def test_training_is_flow_matching_as_it_is() -> None:
    nets = nets_with(TinyNetwork(), path_on(Box(-1.0, 1.0)), "velocity")
    ours, plain = (method.loss(nets, batch_of(32), noise_of(32)) for method in (ReflectedFlow(), FlowMatching(times=Uniform())))
    assert torch.equal(ours.value, plain.value)
    assert fall_of(ReflectedFlow(), path_on(Box(-2.0, 2.0)), "velocity") < 0.8


@pytest.mark.parametrize("path", [RectifiedFlow(), TrigFlow(space=Inside(domain=Box()))])
def test_other_paths_are_refused(path: RectifiedFlow | TrigFlow) -> None:
    with pytest.raises(ValueError, match=r"set path\.space to inside"):
        ReflectedFlow().check(path)
    ReflectedFlow().check(RectifiedFlow(space=Inside()))
