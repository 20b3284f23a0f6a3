"""A network that knows the answer (the exact raw output for one x0 and eps) must be read back exactly, whatever it predicts."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser, Prediction, drop_condition
from gentrain.paths.base import Path, expand
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.trigflow import TrigFlow
from gentrain.paths.variance_exploding import VarianceExploding
from gentrain.paths.variance_preserving import VariancePreserving

PATHS = {
    "variance_preserving": VariancePreserving(schedule="cosine"),
    "variance_exploding": VarianceExploding(sigma_data=0.7),
    "rectified_flow": RectifiedFlow(),
    "trigflow": TrigFlow(sigma_data=0.7),
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
every_prediction = pytest.mark.parametrize("prediction", get_args(Prediction))


class Oracle:
    """Returns what it is told to; remembers what it was given."""

    def __init__(self, output: Tensor):
        self.output, self.calls = output, []

    def __call__(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        self.calls.append((x, t, condition))
        return self.output


def problem(path: Path, prediction: Prediction, dtype: torch.dtype = torch.float64, margin: float = 0.02) -> tuple:
    torch.manual_seed(0)
    t = path.t_min + (path.t_max - path.t_min) * torch.linspace(margin, 1 - margin, 16, dtype=dtype)
    x0, eps = torch.randn(2, 16, 3, 2, 2, dtype=dtype)
    denoiser = Denoiser(Oracle(torch.zeros(())), path, prediction)
    denoiser.network.output = denoiser.target(x0, eps, t)
    return denoiser, x0, eps, t, path.perturb(x0, eps, t)


@every_path
@every_prediction
def test_every_quantity_is_recovered_from_every_prediction_in_one_call(path: Path, prediction: Prediction) -> None:
    denoiser, x0, eps, t, x_t = problem(path, prediction)
    alpha, sigma = expand(path.alpha(t), x0), expand(path.sigma(t), x0)
    expected = {
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "velocity": path.velocity(x0, eps, t),
        "score": (alpha * x0 - x_t) / sigma**2,
    }
    for count, (name, value) in enumerate(expected.items(), start=1):
        torch.testing.assert_close(getattr(denoiser, name)(x_t, t), value, rtol=1e-7, atol=1e-7)
        assert len(denoiser.network.calls) == count


@every_path
@every_prediction
def test_x0_is_accurate_in_float32(path: Path, prediction: Prediction) -> None:
    """Within 1e-5 of the data's scale, times the noise-to-signal ratio where eps or velocity is predicted (inherent amplification)."""
    denoiser, x0, _, t, x_t = problem(path, prediction, torch.float32)
    amplification = (1 + path.sigma(t) / path.alpha(t)) if prediction in ("eps", "velocity") else torch.ones_like(t)
    assert ((denoiser.x0(x_t, t) - x0).abs() / expand(amplification, x0)).max() < 1e-5


@every_path
@every_prediction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_path_are_finite(path: Path, prediction: Prediction, dtype: torch.dtype) -> None:
    denoiser, _, _, t, x_t = problem(path, prediction, dtype, margin=0.0)
    for name in ("x0", "eps", "v", "velocity", "score"):
        assert getattr(denoiser, name)(x_t, t).isfinite().all(), name


@every_path
@pytest.mark.parametrize("prediction", ["x0", "v", "velocity", "edm"])
def test_x0_is_exact_at_the_noise_end(path: Path, prediction: Prediction) -> None:
    denoiser, x0, _, t, x_t = problem(path, prediction, margin=0.0)
    torch.testing.assert_close(denoiser.x0(x_t, t)[-1], x0[-1], rtol=1e-9, atol=1e-9)


@every_path
@pytest.mark.parametrize("prediction", ["eps", "v", "velocity", "edm"])
def test_eps_is_exact_at_the_data_end(path: Path, prediction: Prediction) -> None:
    denoiser, _, eps, t, x_t = problem(path, prediction, margin=0.0)
    torch.testing.assert_close(denoiser.eps(x_t, t)[0], eps[0], rtol=1e-9, atol=1e-9)


@every_path
def test_edm_is_the_preconditioning_of_the_paper_on_the_rescaled_sample(path: Path) -> None:
    torch.manual_seed(0)
    denoiser, _, _, t, x_t = problem(path, "edm")
    denoiser.network.output = torch.randn_like(x_t)
    noise_level, data = expand(path.sigma(t) / path.alpha(t), x_t), path.sigma_data
    rescaled = x_t / expand(path.alpha(t), x_t)
    c_skip = data**2 / (noise_level**2 + data**2)
    c_out = noise_level * data / (noise_level**2 + data**2).sqrt()
    c_in = 1 / (noise_level**2 + data**2).sqrt()
    torch.testing.assert_close(denoiser.x0(x_t, t), c_skip * rescaled + c_out * denoiser.network.output, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(denoiser.network.calls[0][0], c_in * rescaled, rtol=1e-9, atol=1e-9)


@every_path
def test_edm_input_and_target_have_unit_variance(path: Path) -> None:
    torch.manual_seed(0)
    t = path.t_min + (path.t_max - path.t_min) * torch.linspace(0, 1, 5, dtype=torch.float64)
    x0, eps = path.sigma_data * torch.randn(5, 100_000, dtype=torch.float64), torch.randn(5, 100_000, dtype=torch.float64)
    denoiser = Denoiser(Oracle(x0), path, "edm")
    denoiser.raw(path.perturb(x0, eps, t), t)
    for value in (denoiser.network.calls[0][0], denoiser.target(x0, eps, t)):
        torch.testing.assert_close(value.std(1), torch.ones(5, dtype=torch.float64), rtol=0.02, atol=0)


@every_path
@every_prediction
def test_the_network_sees_a_bounded_input_and_its_own_time(path: Path, prediction: Prediction) -> None:
    denoiser, _, _, t, x_t = problem(path, prediction)
    condition = {"label": torch.arange(16)}
    denoiser.x0(x_t, t, condition)
    x, time, given = denoiser.network.calls[0]
    assert given is condition and torch.equal(time, path.network_time(t))
    assert x.abs().max() < 10
    assert torch.equal(x, x_t) or prediction == "edm" or path.unbounded


def test_velocity_prediction_on_the_rectified_flow_is_eps_minus_x0() -> None:
    x0, eps, t = torch.tensor([[1.0], [1.0]]), torch.tensor([[3.0], [3.0]]), torch.tensor([0.0, 0.5])
    assert Denoiser(Oracle(x0), RectifiedFlow(), "velocity").target(x0, eps, t).tolist() == [[2.0], [2.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_output_is_combined_in_float32(dtype: torch.dtype) -> None:
    denoiser, x0, eps, t, x_t = problem(PATHS["variance_preserving"], "v", torch.float32)
    denoiser.network.output = denoiser.network.output.to(dtype)
    assert denoiser.raw(x_t, t).dtype == torch.float32
    alpha, sigma = expand(denoiser.path.alpha(t), x0), expand(denoiser.path.sigma(t), x0)
    torch.testing.assert_close(denoiser.x0(x_t, t), alpha * x_t - sigma * denoiser.network.output.float(), rtol=1e-4, atol=1e-5)


def test_an_unknown_prediction_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="choose one of x0, eps, v, velocity, edm"):
        Denoiser(Oracle(torch.zeros(())), RectifiedFlow(), "epsilon")


def test_drop_condition_makes_chosen_rows_null_and_leaves_the_batch_alone() -> None:
    condition = {"label": torch.tensor([3, 4, 5])}
    assert drop_condition(condition, torch.tensor([True, False, True]))["label"].tolist() == [-1, 4, -1]
    assert condition["label"].tolist() == [3, 4, 5]
