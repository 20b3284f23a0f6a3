"""Closed forms of DDO on a discrete space (specification, D1 to D6), and what the method makes of networks.

Mutations that these tests were seen to catch: mean in place of sum, no weight, either sign, alpha left out, rows without label left out of
the mean, log(1 - sigmoid), the difference of two sums, gradients into the reference, other noise for the reference, dropped rows kept,
fakes drawn by the model or with gradient, a guard blind to NaN, digest or guidance of a pool not compared.
"""

import copy
import json
import math
from pathlib import Path as FilePath
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import log_softmax

from gentrain.config import ConfigError, Document
from gentrain.data.pool import Pool
from gentrain.methods.base import Clock
from gentrain.methods.ddo import DDO, ddo_loss, log_ratio, read_calibration
from gentrain.methods.diffusion import Diffusion
from gentrain.methods.flow_matching import FlowMatching
from gentrain.models.denoiser import Denoiser, Prediction
from gentrain.noise import Noise
from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.reflected_heat import ReflectedHeat
from gentrain.paths.times import LogitNormal, LogNormal, Uniform
from gentrain.paths.trigflow import TrigFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.paths.variance_preserving import VariancePreserving
from gentrain.recipes.calibrate import refuse_meaningless, spread
from gentrain.samplers.heun import Heun
from gentrain.training.run import parse_run
from tests.methods.toy import TinyNetwork, batch_of, clusters_of, noise_of

LN2 = math.log(2)
K, ROWS = 16, 400


# --- discrete space ---------------------------------------------------------------------------------------------------------


def discrete() -> tuple[Tensor, Tensor, Tensor]:
    """Items of data as rows [ROWS] of K values, their law and the reference's, float64."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 45, (K,), generator=generator)
    counts[0] += ROWS - counts.sum()
    assert counts.min() > 0
    reference = torch.randn(K, generator=generator, dtype=torch.float64).softmax(0)
    return torch.arange(K).repeat_interleave(counts), counts.double() / ROWS, reference


def optimum(alpha: float, beta: float) -> Tensor:
    """The law that minimises the loss, found by LBFGS; the reference's samples count by their probabilities."""
    rows, _, reference = discrete()
    logits = reference.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        ratio = log_softmax(logits, 0) - reference.log()
        loss = ddo_loss(ratio[rows], ratio, alpha, beta, K * reference)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return logits.detach().softmax(0)


def variation(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().sum() / 2)


def test_the_optimum_is_the_law_of_the_data() -> None:
    _, data, reference = discrete()
    assert variation(reference, data) > 0.2
    assert variation(optimum(1, 1), data) < 1e-6


@pytest.mark.parametrize("beta", [0.25, 0.5, 2.0])
def test_the_optimum_of_another_beta_is_the_tilted_law_at_alpha_z_to_the_beta(beta: float) -> None:
    _, data, reference = discrete()
    tilted = reference ** (1 - 1 / beta) * data ** (1 / beta)
    z = float(tilted.sum())
    assert (z > 1) == (beta < 1)
    assert variation(optimum(z**beta, beta), tilted / z) < 1e-6
    if beta == 0.5:  # the control: the formula is not that of alpha = 1
        assert variation(optimum(1, beta), tilted / z) > 0.1


@pytest.mark.parametrize("alpha", [0.0, 1.0, 4.0, 30.0])
def test_the_first_gradient_is_half_beta_that_of_the_likelihood(alpha: float) -> None:
    rows, data, reference = discrete()
    beta = 0.7
    logits = reference.log().clone().requires_grad_()
    ratio = log_softmax(logits, 0) - reference.log()
    ddo_loss(ratio[rows], ratio, alpha, beta, K * reference).backward()
    assert (logits.grad - -(beta / 2) * (data - reference)).abs().max() < 1e-12


def test_one_time_per_sample_bounds_the_loss_from_above() -> None:
    changes = 3 * Noise(0, torch.arange(500)).normal((500, 8), torch.float64)
    for alpha, beta in ((1, 1.0), (4, 0.05), (2, 5.0)):
        per_time = ddo_loss(changes.flatten(), changes.flatten(), alpha, beta)
        assert per_time > ddo_loss(changes.mean(1), changes.mean(1), alpha, beta)


def test_the_loss_begins_at_one_plus_alpha_bits_and_weights_stay_in_the_mean() -> None:
    zeros = torch.zeros(10)
    assert ddo_loss(zeros, zeros, 3.0, 0.7).item() == pytest.approx(4 * LN2, abs=1e-6)
    weight = torch.tensor([1.0, 0.0]).repeat(5)
    assert ddo_loss(zeros, zeros, 3.0, 0.7, weight).item() == pytest.approx(2.5 * LN2, abs=1e-6)


def test_extreme_ratios_are_finite_where_the_literal_form_is_not() -> None:
    ratio = torch.tensor([1e4, -1e4]).requires_grad_()
    loss = ddo_loss(ratio, ratio, 2.0, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(1.5e4) and ratio.grad.isfinite().all()
    assert not (-(1 - ratio.detach().sigmoid()).log()).isfinite().all()
    assert ddo_loss(torch.tensor([20.0]), torch.tensor([20.0]), 1.0, 1.0).item() == pytest.approx(20.0)  # it says inf here


# --- the log-ratio ----------------------------------------------------------------------------------------------------------


def test_the_log_ratio_is_the_weighted_difference_of_summed_squares() -> None:
    a, b, y = (Noise(seed, torch.arange(4)).normal((4, 3, 5, 2)) for seed in range(3))
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0])
    expected = weight.double() * ((b.double() - y.double()) ** 2 - (a.double() - y.double()) ** 2).sum((1, 2, 3))
    torch.testing.assert_close(log_ratio(a, b, y, weight), expected.float(), rtol=1e-5, atol=1e-5)


def test_the_log_ratio_keeps_what_the_difference_of_two_sums_would_lose() -> None:
    b, y = (Noise(seed, torch.arange(8)).normal((8, 3072)) for seed in range(2))
    a = b + 1e-7 * b.sign()
    exact = ((b.double() - y) ** 2 - (a.double() - y) ** 2).sum(1)
    found = log_ratio(a, b, y, torch.ones(8)).double()
    naive = ((b - y) ** 2).sum(1).double() - ((a - y) ** 2).sum(1).double()
    assert ((found - exact) / exact).abs().max() < 1e-3 < ((naive - exact) / exact).abs().max()


def changed(network: TinyNetwork) -> TinyNetwork:
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * Noise(3, torch.arange(len(parameter))).normal(tuple(parameter.shape)))
    return other


def nets(path: Path, prediction: Prediction, same: bool = False) -> SimpleNamespace:
    reference = TinyNetwork()
    model = copy.deepcopy(reference) if same else changed(reference)
    return SimpleNamespace(reference=Denoiser(reference, path, prediction), model=Denoiser(model, path, prediction))


PAIRS: list[tuple[Path, Prediction, dict[str, Any], Any]] = [
    (VarianceExploding(), "edm", {"times": LogNormal()}, Diffusion),
    (VariancePreserving(), "eps", {"times": Uniform()}, Diffusion),
    (VariancePreserving(), "v", {"times": Uniform(), "weighting": "min_snr"}, Diffusion),
    (RectifiedFlow(), "x0", {"times": LogitNormal(), "weighting": "edm"}, Diffusion),
    (RectifiedFlow(), "velocity", {"times": LogitNormal()}, FlowMatching),
    (TrigFlow(sigma_data=1.0), "velocity", {"times": Uniform()}, FlowMatching),
]


@pytest.mark.parametrize("path, prediction, settings, trained_by", PAIRS)
def test_the_log_ratio_is_what_the_training_losses_of_both_networks_differ_by(
    path: Path, prediction: Prediction, settings: dict[str, Any], trained_by: Any
) -> None:
    group, batch = nets(path, prediction), batch_of(64)
    found = DDO(**settings).ratio(group, batch, noise_of(64))
    losses = [
        trained_by(**settings).loss(SimpleNamespace(model=denoiser), batch, noise_of(64)).value.double()
        for denoiser in (group.model, group.reference)
    ]
    assert found.log_ratio.mean().item() == pytest.approx(2 * (losses[1] - losses[0]).item(), rel=1e-3)  # a sum over 2 coordinates
    assert [found.loss.mean().item(), found.reference_loss.mean().item()] == pytest.approx([loss.item() for loss in losses], rel=1e-5)


# --- the method -------------------------------------------------------------------------------------------------------------


def with_fakes(count: int) -> dict[str, Tensor]:
    fakes = batch_of(count, 1000)
    return batch_of(count) | {"fake/x": fakes["x"], "fake/label": fakes["label"]}


def method(**settings: Any) -> DDO:
    return DDO(**{"pool": "elsewhere", "beta": 5.0, "alpha": 2.0, **settings})


@pytest.mark.parametrize("path, prediction, settings, _", PAIRS)
def test_a_model_that_is_its_reference_has_the_loss_of_a_coin(path: Path, prediction: Prediction, settings: dict[str, Any], _: Any) -> None:
    group = nets(path, prediction, same=True)
    found = method(label_dropout=0.0, **settings).loss(group, with_fakes(64), noise_of(64))
    assert found.value.item() == pytest.approx(3 * LN2, abs=1e-6)
    assert (found.logs["log_ratio_square"], found.logs["discriminator_accuracy"]) == (0, 0.5)


def test_both_networks_meet_the_same_labels_and_only_one_learns() -> None:
    group = nets(VarianceExploding(), "edm")
    reference, model = group.reference.network, group.model.network
    method(label_dropout=0.5, times=LogNormal()).loss(group, with_fakes(64), noise_of(64)).value.backward()
    for a, b in zip(reference.seen, model.seen, strict=True):
        assert torch.equal(a, b) and 0 < (a < 0).sum() < 64
    assert not torch.equal(model.seen[0] < 0, model.seen[1] < 0)  # of data and samples: draws of their own
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_rows_without_label_are_not_pushed_away() -> None:
    group = nets(VarianceExploding(), "edm")
    settings: dict[str, Any] = {"label_dropout": 1.0, "times": LogNormal()}
    losses = [method(alpha=alpha, **settings).loss(group, with_fakes(64), noise_of(64)).value.item() for alpha in (0.0, 50.0)]
    assert losses[0] == losses[1]
    half = method(alpha=2.0, label_dropout=0.5, times=LogNormal()).loss(
        nets(VarianceExploding(), "edm", same=True), with_fakes(2000), noise_of(2000)
    )
    assert half.value.item() == pytest.approx(2 * LN2, rel=0.03)  # they keep their place in the mean


@pytest.mark.parametrize("labels", ["none", "null"])
def test_all_rows_of_an_unconditional_model_count(labels: str) -> None:
    batch = with_fakes(64)
    if labels == "none":
        batch = {key: value for key, value in batch.items() if "label" not in key}
    else:
        batch |= {"label": torch.full((64,), -1), "fake/label": torch.full((64,), -1)}
    group = nets(VarianceExploding(), "edm", same=True)
    found = method(label_dropout=0.5, times=LogNormal()).loss(group, batch, noise_of(64))
    assert found.value.item() == pytest.approx(3 * LN2, abs=1e-6)


def test_rows_without_prompt_are_not_pushed_away() -> None:
    group = SimpleNamespace(
        reference=Denoiser(lambda x, t, condition: x, VarianceExploding(), "edm"),
        model=Denoiser(lambda x, t, condition: x, VarianceExploding(), "edm"),
    )
    batch = {key: value for key, value in with_fakes(64).items() if "label" not in key}
    batch |= {"condition/null": torch.zeros(64, dtype=torch.bool), "fake/condition/null": torch.arange(64) < 16}
    found = method(label_dropout=1.0, times=LogNormal()).loss(group, batch, noise_of(64))
    assert found.value.item() == pytest.approx((1 + 2 * 16 / 64) * LN2, abs=1e-6)  # what had no prompt before is kept


def test_alpha_is_normalised_on_request() -> None:
    group = nets(VarianceExploding(), "edm")
    for alpha, divisor in ((4.0, 4.0), (0.5, 1.0)):
        plain, normal = (
            method(alpha=alpha, normalise_alpha=flag, times=LogNormal()).loss(group, with_fakes(8), noise_of(8)).value.item()
            for flag in (False, True)
        )
        assert normal == pytest.approx(plain / divisor)


def test_fakes_are_drawn_by_the_reference_with_the_labels_of_the_batch() -> None:
    group = nets(VarianceExploding(), "edm")
    reference, model = group.reference.network, group.model.network
    on_the_fly = DDO(beta=5.0, alpha=2.0, times=LogNormal(), label_dropout=0.0, sampler=Heun(steps=3))
    assert on_the_fly.pools() == {}
    found = on_the_fly.loss(group, batch_of(16), noise_of(16))
    assert (len(reference.seen), len(model.seen)) == (5 + 2, 2)
    assert all(torch.equal(seen, batch_of(16)["label"]) for seen in reference.seen)
    found.value.backward()
    assert all(parameter.grad is None for parameter in reference.parameters())
    noise = noise_of(16)
    with torch.no_grad():
        drawn = Heun(steps=3).sample(group.reference, (16, 2), noise, {"label": batch_of(16)["label"]})
    batch = batch_of(16) | {"fake/x": drawn, "fake/label": batch_of(16)["label"]}
    pooled = method(times=LogNormal(), label_dropout=0.0).loss(group, batch, noise)
    assert found.value.item() == pooled.value.item()


def test_the_model_learns_to_tell_data_from_fakes() -> None:
    path = VarianceExploding()
    group = nets(path, "edm", same=True)
    before = copy.deepcopy(group.reference.network.state_dict())
    (update,) = method(alpha=1.0, label_dropout=0.0, times=LogNormal()).updates(Clock(0, 256, 256))
    assert update.role == DDO.generator == "model"
    optimizer = torch.optim.Adam(group.model.network.parameters(), lr=3e-3)
    for step in range(60):
        batch = clusters_of(256, 256 * step)
        batch |= {"fake/x": batch_of(256, 256 * step)["x"], "fake/label": batch["label"]}
        found = update.losses[0](group, batch, noise_of(256, 256 * step))
        optimizer.zero_grad()
        found.value.backward()
        optimizer.step()
    assert found.value < 1.8 * LN2 and found.logs["discriminator_accuracy"] > 0.65
    assert all(torch.equal(before[key], value) for key, value in group.reference.network.state_dict().items())


def test_what_is_logged_is_of_both_halves() -> None:
    group, batch = nets(VarianceExploding(), "edm"), with_fakes(64)
    asked = method(label_dropout=0.0, times=LogNormal())
    logs, noise = asked.loss(group, batch, noise_of(64)).logs, noise_of(64)
    real, fake = (asked.ratio(group, rows, noise).log_ratio for rows in (batch, {"x": batch["fake/x"], "label": batch["fake/label"]}))
    assert logs["log_ratio_square"].item() == pytest.approx((real.square().mean() + fake.square().mean()).item() / 2, rel=1e-5)
    assert logs["log_ratio_data"].item() == pytest.approx(real.mean().item(), rel=1e-5)
    assert logs["log_ratio_fake"].item() == pytest.approx(fake.mean().item(), rel=1e-5)
    right = ((real > 0).double().mean() + (fake < 0).double().mean()) / 2
    assert logs["discriminator_accuracy"].item() == pytest.approx(right.item(), rel=1e-5)
    assert not any(value.requires_grad for value in logs.values())


def test_the_guard_speaks_above_twice_the_loss_of_the_reference() -> None:
    sound = {"model_loss": 1.99, "reference_loss": 1.0}
    assert method().diverged(sound) is None and method().diverged({}) is None
    for value in (2.01, float("nan")):
        why = method().diverged(sound | {"model_loss": value})
        assert why is not None and "raise method.beta" in why and "2 times" in why
    assert method(guard=4.0).diverged(sound | {"model_loss": 2.01}) is None


# --- pools and beta ---------------------------------------------------------------------------------------------------------


def pool(tmp_path: FilePath, **changes: Any) -> Pool:
    x = changes.pop("x", torch.zeros(6, 2))
    save_file({"x": x, "label": changes.pop("label", torch.arange(6) % 3)}, tmp_path / "samples.safetensors")
    info = {"weights": "abc", "other_law": None} | changes
    (tmp_path / "info.json").write_text(json.dumps({key: value for key, value in info.items() if value != "absent"}))
    return Pool(str(tmp_path), "reference", "method.pool")


def test_a_pool_of_the_reference_is_read(tmp_path: FilePath) -> None:
    found = pool(tmp_path)
    found.require("abc")
    assert found.items((2,), 3).batch(torch.tensor([4]))["label"].tolist() == [1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weights": "xyz"}, r"drawn by other weights \(xyz\)"),
        ({"other_law": "guidance 2"}, "with guidance 2"),
        ({"other_law": "absent"}, "does not say"),
        ({"weights": "absent"}, "does not say which weights"),
    ],
)
def test_samples_of_something_else_are_refused(tmp_path: FilePath, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        pool(tmp_path, **changes).require("abc")
    assert caught.value.key == "method.pool"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.zeros(6, 3)}, r"expected finite torch\.float32 samples \[2\]"),
        ({"x": torch.full((6, 2), float("nan"))}, "expected finite"),
        ({"label": torch.full((6,), 3)}, "the data have 3 classes"),
        ({"label": torch.full((6,), -2)}, "labels from -2"),
        ({"label": torch.zeros(5, dtype=torch.int64)}, "with an int64 label each"),
    ],
)
def test_samples_that_do_not_fit_are_refused(tmp_path: FilePath, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pool(tmp_path, **changes).items((2,), 3)


def test_a_pool_of_tokens_has_no_other_values(tmp_path: FilePath) -> None:
    tokens = torch.arange(12).reshape(6, 2)
    assert torch.equal(pool(tmp_path, x=tokens).items((2,), 3, 12).x, tokens)
    for wrong in (tokens, tokens - 1):
        with pytest.raises(ConfigError, match="the data have 11 values"):
            pool(tmp_path, x=wrong).items((2,), 3, 11)
    with pytest.raises(ConfigError, match="is drawn with decoded: false"):
        pool(tmp_path).items((2,), 3, 12)


def test_a_missing_pool_is_refused(tmp_path: FilePath) -> None:
    with pytest.raises(ConfigError, match="draw the samples with a stage `generate`"):
        Pool(str(tmp_path), "reference", "method.pool").items((2,), 3)


def settings(**method: Any) -> dict[str, Any]:
    return {
        "method": {"name": "ddo", **method}, "data": "spiral", "model": "mlp", "training": {"samples": 64},
        "roles": {"reference": {"weights": "runs/edm"}},
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, key, message",
    [
        ({"method": {"name": "ddo", "beta": 0.05}}, "method.beta", "take at least 5"),
        (
            {"method": {"name": "ddo", "beta": 5, "sampler": {"name": "euler", "guidance": 2}}},
            "method.sampler.guidance",
            "samples with guidance 2 are no samples",
        ),
        ({"roles": {}}, "roles.reference.weights", "name a run's directory"),
        ({"path": {"name": "reflected_heat", "space": {"name": "inside", "domain": {"name": "box"}}}}, "path", "take a path other than"),
    ],
)
def test_mistakes_are_told_as_the_configuration_loads(change: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_run(Document(settings(beta=5) | change, "test"))
    assert caught.value.key == key


def test_a_small_beta_is_right_where_a_weighting_makes_the_log_ratio_large() -> None:
    run = parse_run(Document(settings(beta=0.05, weighting="edm"), "test"))
    assert isinstance(run.method, DDO) and run.method.beta == 0.05


def test_beta_is_read_from_a_calibration(tmp_path: FilePath) -> None:
    run = parse_run(Document(settings(beta=str(tmp_path)), "test"))
    with pytest.raises(ConfigError, match="output of a stage `calibrate`") as caught:
        run.fit_space()
    assert caught.value.key == "method.beta"
    (tmp_path / "calibration.json").write_text('{"beta": 12.5}')
    run.fit_space()
    assert isinstance(run.method, DDO) and run.method.beta == 12.5
    for bad in ("0", "-1", "Infinity", '"x"'):
        (tmp_path / "calibration.json").write_text(f'{{"beta": {bad}}}')
        with pytest.raises(ConfigError):
            read_calibration(str(tmp_path))


def test_a_beta_far_from_the_spread_is_refused() -> None:
    found = spread(0.01, 0.6, 0.3)
    assert (found.beta, found.log_ratio) == (3.0, pytest.approx(0.1))
    for beta in (0.2, 5.0, 50.0, 200.0):
        refuse_meaningless(beta, found)
    with pytest.raises(ConfigError, match=r"says 1/2 of every sample.*take beta = 3"):
        refuse_meaningless(0.05, found)
    with pytest.raises(ConfigError, match="is certain of every sample"):
        refuse_meaningless(300.0, found)
    for square in (0.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"raise optimizer\.lr"):
            spread(square, 0.5, 1.0)


def test_the_path_of_heat_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="other than reflected_heat"):
        DDO().check(ReflectedHeat())
