import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gentrain.config import ConfigError, Document, build
from gentrain.methods.base import Clock, Method
from gentrain.methods.consistency import row_huber
from gentrain.methods.easy_consistency_tuning import EasyConsistencyTuning, earlier_level, level_weight
from gentrain.models.base import Condition
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.times import LogNormal
from gentrain.paths.variance_exploding import VarianceExploding
from tests.methods.few_step import gradients_hold_calls_fixed
from tests.methods.toy import TinyNetwork, batch_of, nets_with, noise_of


def test_earlier_levels_by_the_formula() -> None:
    t = torch.tensor([0.01, 0.5, 2.0, 80.0], dtype=torch.float64)
    for rho in (0.5, 0.75, 0.99):
        expected = [max(x - x * (1 - rho) * (1 + 8 / (1 + math.exp(x))), 0.0) for x in t.tolist()]
        assert earlier_level(t, 1 - rho).tolist() == pytest.approx(expected)
    assert earlier_level(t, 0.5)[0] == 0  # the first stage: diffusion at low noise
    assert level_weight("interval", t, t / 2).tolist() == pytest.approx([2 / x for x in t.tolist()])
    assert level_weight("root_interval", t, t / 2).tolist() == pytest.approx([(x / 2) ** -0.5 for x in t.tolist()])
    assert level_weight("level", t, t / 2).tolist() == pytest.approx([x**-2 for x in t.tolist()])


def test_the_distance_of_the_levels_falls_by_q_from_stage_to_stage() -> None:
    method = EasyConsistencyTuning(q=2, stages=4, closest=0.1)
    assert [method.shrink(progress) for progress in (0.0, 0.24, 0.25, 0.5, 0.75, 1.0)] == [0.5, 0.5, 0.25, 0.125, 0.1, 0.1]
    assert EasyConsistencyTuning(stages=2, closest=0.0).shrink(1.0) == 0.25  # the last stage lasts to the end
    for samples, shrink in ((0, 0.5), (40, 0.25)):
        (update,) = method.updates(Clock(samples, 10, 100))
        assert update.losses[0].args[0] == shrink  # type: ignore[attr-defined]


@pytest.mark.parametrize("path, scale", [(RectifiedFlow(), 1000.0), (VarianceExploding(), None)])
def test_both_points_share_data_and_noise_at_levels_of_the_rule(path: Any, scale: float | None) -> None:
    seen = []

    def network(x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        level = t / scale / (1 - t / scale) if scale else (t / 250).exp()
        alpha = 1 - t / scale if scale else 1 / (level**2 + 0.25).sqrt()
        seen.append((x / alpha[:, None], level))
        return x

    count = 2000
    x0 = batch_of(count)["x"].double()
    prediction = "velocity" if scale else "edm"
    EasyConsistencyTuning().loss(0.125, nets_with(network, path, prediction), {"x": x0}, noise_of(count))  # type: ignore[arg-type]
    (y_r, r), (y_t, t) = seen
    rows = (r > 0.01) & (t < 50)
    torch.testing.assert_close(r[rows], earlier_level(t, 0.125)[rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(((y_r - x0) / r[:, None])[rows], ((y_t - x0) / t[:, None])[rows], rtol=1e-3, atol=1e-3)
    log = t.log()
    assert abs(log.mean() + 1.1) < 0.15 and abs(log.std() - 2.0) < 0.1


def test_with_r_at_zero_the_target_is_the_data_point() -> None:
    """shrink 1: diffusion. The network's own answer at the path's lower end plays no part."""
    network, batch = TinyNetwork(), batch_of(64)
    path = VarianceExploding()
    found = EasyConsistencyTuning(label_dropout=0.0).loss(1.0, nets_with(network, path, "edm"), batch, noise_of(64))
    assert found.logs["diffusion_share"] == 1
    noise = noise_of(64)
    t = EasyConsistencyTuning().times.sample(noise.uniform((64,)), path)
    noise.bernoulli(0.0, (64,))
    x_t = path.perturb(batch["x"], path.draw_eps(noise, (64, 2)), t)
    x0 = nets_with(network, path, "edm").model.x0(x_t, t, {"label": batch["label"]})
    expected = (row_huber(x0, batch["x"]) / t).mean()
    assert found.value.item() == pytest.approx(expected.item(), rel=1e-4)


class Constant(nn.Module):
    """An x0 prediction that is one number everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return self.value.expand_as(x)


def test_the_square_has_the_mean_of_noisy_targets_as_its_optimum_and_the_norm_their_median() -> None:
    """Targets that are 1 in three quarters of the rows and 0 in the others, in one coordinate."""
    count, found = 40_000, {}
    batch = {"x": (torch.arange(count) % 4 > 0).float()[:, None]}
    for distance in ("l2", "huber"):
        network = Constant(0.75)
        method = EasyConsistencyTuning(distance=distance, weighting="root_interval", times=LogNormal(std=0.3))  # type: ignore[arg-type]
        method.loss(1.0, nets_with(network, VarianceExploding(), "x0"), batch, noise_of(count)).value.backward()
        assert network.value.grad is not None
        found[distance] = network.value.grad.item()
    assert abs(found["l2"]) < 0.05 < 0.5 < -found["huber"]  # towards 1


def test_stages_that_would_not_shrink_are_refused() -> None:
    with pytest.raises(ConfigError, match="with q 1 the two times never come closer"):
        build(Method, Document({"name": "easy_consistency_tuning", "q": 1}, "x.yaml"))
    with pytest.raises(ConfigError, match="with closest 1 the two times never come closer"):
        build(Method, Document({"name": "easy_consistency_tuning", "closest": 1}, "x.yaml"))
    with pytest.raises(ConfigError, match="closest"):
        build(Method, Document({"name": "easy_consistency_tuning", "closest": 2}, "x.yaml"))


def test_the_target_is_held_fixed() -> None:
    def loss(module: nn.Module) -> Tensor:
        return EasyConsistencyTuning().loss(0.1, nets_with(module, RectifiedFlow(), "velocity"), batch_of(64), noise_of(64)).value

    assert gradients_hold_calls_fixed(loss, TinyNetwork(), frozen=(0,)) == 2


def test_dropped_labels_are_the_null_class_in_both_calls() -> None:
    network = TinyNetwork()
    EasyConsistencyTuning(label_dropout=1.0).loss(0.5, nets_with(network, RectifiedFlow(), "velocity"), batch_of(8), noise_of(8))
    assert len(network.seen) == 2 and all((seen == -1).all() for seen in network.seen)
