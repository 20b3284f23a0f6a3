"""What every few-step method owes its options and its path's space, and what its loss does with rows, labels and micro-batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gentrain.domains.box import Box
from gentrain.methods.base import Clock, Method
from gentrain.methods.consistency_distillation import ConsistencyDistillation
from gentrain.methods.consistency_training import ConsistencyTraining
from gentrain.methods.continuous_consistency import ContinuousConsistency
from gentrain.methods.easy_consistency_tuning import EasyConsistencyTuning
from gentrain.methods.latent_consistency import LatentConsistency
from gentrain.methods.mean_flow import MeanFlow
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.models.loss_weight import LossWeightNetwork
from gentrain.paths.base import Path
from gentrain.paths.dual import Dual
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.times import LogNormal, Uniform
from gentrain.paths.trigflow import TrigFlow
from gentrain.paths.variance_preserving import VariancePreserving
from tests.methods.toy import TinyNetwork, batch_of, noise_of

ROWS = 256
RF = RectifiedFlow()
BASE: dict[type[Method], dict[str, Any]] = {
    ConsistencyDistillation: {}, ConsistencyTraining: {}, EasyConsistencyTuning: {},
    LatentConsistency: {"guidance": (3.0, 3.0), "count": 5, "stride": 200}, ContinuousConsistency: {"derivative": "difference"},
    MeanFlow: {"derivative": "difference", "power": 0.5, "equal": 0.25},
}  # fmt: skip
# Method -> options that differ from what BASE has.
OPTIONS: dict[type[Method], list[dict[str, Any]]] = {
    ConsistencyDistillation: [{"distance": "l2"}, {"intervals": 7}, {"solver": "heun"}, {"guidance": 3.0}],
    ConsistencyTraining: [
        {"distance": "l2"}, {"first_intervals": 40}, {"last_intervals": 20}, {"lowest": 0.1}, {"highest": 2.0}, {"mean": 1.0}, {"std": 0.5},
        {"label_dropout": 0.9},
    ],
    EasyConsistencyTuning: [
        {"distance": "l2"}, {"times": LogNormal(mean=0.5, std=1.5)}, {"q": 3}, {"stages": 2}, {"closest": 0.5}, {"weighting": "level"},
        {"weighting": "root_interval"}, {"label_dropout": 0.9},
    ],
    LatentConsistency: [
        {"distance": "l2"}, {"huber": 0.1}, {"guidance": (5.0, 5.0)}, {"guidance": (3.0, 5.0)}, {"solver": "dpmpp_2s"},
        {"count": 4}, {"stride": 100}, {"grid": VariancePreserving()},
    ],
    ContinuousConsistency: [
        {"source": "data"}, {"guidance": 3.0}, {"mean": 0.5}, {"std": 0.5}, {"warmup": 1.0}, {"normalisation": 1.0}, {"step": 0.3},
    ],
    MeanFlow: [
        {"times": Uniform()}, {"equal": 0.75}, {"power": 0.0}, {"c": 1.0}, {"guidance": 2.0}, {"mixing": 0.5}, {"label_dropout": 0.9},
        {"step": 0.4},
    ],
}  # fmt: skip


def nets_of(path: Path, network: Any = None) -> SimpleNamespace:
    """The student is network, the others' weights are others."""
    networks = {role: TinyNetwork() for role in ("student", "model", "target", "teacher")}
    with torch.no_grad():
        for role, scale in {"student": 2.0, "model": 2.0, "target": 1.5, "teacher": 3.0}.items():
            for p in networks[role].parameters():
                p.mul_(scale)
    denoisers = {role: Denoiser(own, path, "velocity") for role, own in networks.items()}
    if network is not None:
        denoisers |= {role: Denoiser(network, path, "velocity") for role in ("student", "model")}
    return SimpleNamespace(**denoisers, weighting=LossWeightNetwork())


def loss_of(method: Method, nets: SimpleNamespace, batch: dict[str, Tensor], progress: float = 0.5) -> float:
    """Of the generator's update, in the middle of a run."""
    first = next(iter(method.updates(Clock(round(progress * 10 * ROWS), ROWS, 10 * ROWS))))
    return first.losses[0](nets, batch, noise_of(len(batch["x"]))).value.item()  # type: ignore[union-attr]


@pytest.mark.parametrize("kind, option", [(kind, option) for kind, options in OPTIONS.items() for option in options])
def test_every_option_is_heeded(kind: type[Method], option: dict[str, Any]) -> None:
    """Each changes the loss of one and the same batch by itself."""
    before, after = (loss_of(kind(**BASE[kind] | each), nets_of(RF), batch_of(ROWS)) for each in ({}, option))
    assert abs(after / before - 1) > 1e-4  # rounding is of 1e-6


@pytest.mark.parametrize("kind", BASE)
def test_the_loss_is_the_mean_over_rows_whatever_rows_are_beside_them(kind: type[Method]) -> None:
    method, half = kind(**BASE[kind]), ROWS // 2
    halves = []
    for start in (0, half):
        first = next(iter(method.updates(Clock(5 * ROWS, ROWS, 10 * ROWS))))
        loss = first.losses[0](nets_of(RF), batch_of(half, start), noise_of(half, start))  # type: ignore[union-attr]
        halves.append(loss.value.item())
    assert loss_of(method, nets_of(RF), batch_of(ROWS)) == pytest.approx(sum(halves) / 2, rel=1e-5)


@pytest.mark.parametrize("kind", BASE)
def test_data_are_taken_in_the_paths_space(kind: type[Method]) -> None:
    """A run in a mirror image is one on data that were mapped before."""
    space = Dual(domain=Box(), nu=float("inf"), mean=[0.1, -0.2], std=[0.8, 1.5])
    batch = {"x": torch.rand(ROWS, 2, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1, "label": torch.arange(ROWS) % 3}
    mapped = batch | {"x": space.encode(batch["x"])}
    method = kind(**BASE[kind])
    there, flat = loss_of(method, nets_of(RectifiedFlow(space=space)), batch), loss_of(method, nets_of(RF), mapped)
    assert there == pytest.approx(flat, rel=1e-6) and there != pytest.approx(loss_of(method, nets_of(RF), batch), rel=1e-4)


class Spy(TinyNetwork):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        assert condition is not None
        self.calls.append((x.detach().clone(), t.clone(), condition["label"]))
        return super().forward(x, t, condition)


def test_mean_flow_learns_the_null_class_where_labels_are_dropped() -> None:
    network, batch = Spy(), batch_of(ROWS)
    loss_of(MeanFlow(derivative="difference", label_dropout=0.5, guidance=2.0), nets_of(RF, network), batch)
    guide, ahead, behind, learnt = (labels for _, _, labels in network.calls)
    assert torch.equal(guide, torch.cat([batch["label"], torch.full((ROWS,), -1)]))
    dropped = learnt == -1
    assert 0.4 < dropped.float().mean() < 0.6 and torch.equal(learnt[~dropped], batch["label"][~dropped])
    assert torch.equal(ahead, learnt) and torch.equal(behind, learnt)


def test_mean_flow_goes_along_the_guided_velocity() -> None:
    """Both points of the difference lie on the line that leads where the guided velocity does (arXiv:2505.13447, section 4.2)."""
    method, batch, network = MeanFlow(derivative="difference", guidance=3.0, label_dropout=1e-9, equal=0.0), batch_of(ROWS), Spy()
    denoiser = Denoiser(network, RF, "velocity")
    loss_of(method, nets_of(RF, network), batch)
    _, (ahead, later, _), (behind, earlier, _), (x, t, _) = network.calls
    slope = (ahead - behind) / ((later - earlier) / 1000)[:, None]
    eps = (x - (1 - t / 1000)[:, None] * batch["x"]) / (t / 1000)[:, None]
    labels = {"label": batch["label"]}
    guided = method._guided(denoiser, x, t / 1000, labels, eps - batch["x"], torch.zeros(ROWS, dtype=torch.bool))
    rows = t > 50  # eps is found again by a division by t
    torch.testing.assert_close(slope[rows], guided[rows], rtol=2e-3, atol=5e-3)


def test_the_weighting_takes_the_errors_of_its_own_micro_batch() -> None:
    """Of several, in the order in which the student's losses left them."""
    method, t = ContinuousConsistency(), torch.full((4,), 0.5)
    errors = [(t, torch.full((4,), value)) for value in (2.0, 5.0)]
    found = [method.weighting_loss(errors, nets_of(TrigFlow()), batch_of(4), noise_of(4)).value.item() for _ in range(2)]
    assert found == pytest.approx([2.0, 5.0])  # the weight is 1 at first


def test_levels_beyond_a_paths_ends_leave_the_loss_finite() -> None:
    """A log-normal law reaches pure noise on a rectified flow, where sigma / alpha is infinite."""
    method = EasyConsistencyTuning(times=LogNormal(mean=30.0, std=0.1))
    assert 0 < loss_of(method, nets_of(RF), batch_of(ROWS)) < float("inf")


def test_continuous_consistency_counts_in_units_of_the_data() -> None:
    """Noise on its TrigFlow has the deviation that the path gives the data; the network's own path is another."""
    method = ContinuousConsistency(derivative="difference")
    wide, narrow = (loss_of(method, nets_of(RectifiedFlow(sigma_data=size)), batch_of(ROWS)) for size in (1.0, 0.5))
    assert abs(wide / narrow - 1) > 1e-3


def test_the_guidance_that_latent_consistency_builds_in_is_that_of_samplers() -> None:
    """A teacher's velocity of 1 given a label and of 2 without, guided by 3, is one of 2 + 3 (1 - 2) = -1."""

    def loss(guidance: float, given: float, free: float) -> float:
        nets = nets_of(RF)
        nets.teacher = Denoiser(lambda x, t, c: torch.where(c["label"] < 0, free, given)[:, None].expand_as(x), RF, "velocity")
        return loss_of(LatentConsistency(guidance=(guidance, guidance), count=5, stride=200), nets, batch_of(ROWS))

    assert loss(3.0, 1.0, 2.0) == pytest.approx(loss(1.0, -1.0, -1.0), rel=1e-5)
    assert loss(3.0, 1.0, 2.0) != pytest.approx(loss(1.0, 1.0, 2.0), rel=1e-2)
