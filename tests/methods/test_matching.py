import math

import pytest
import torch

from gentrain.methods.matching import loss_by_noise_level, noised, output_error
from gentrain.models.denoiser import Denoiser
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.paths.times import Discrete, Uniform
from tests.methods.toy import batch_of, noise_of


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_labels_are_dropped_with_their_probability(probability: float) -> None:
    batch = batch_of(20_000)
    sample = noised(batch, noise_of(20_000), RectifiedFlow(), Uniform(), probability)
    dropped = sample.condition["label"] == -1
    assert abs(dropped.float().mean().item() - probability) <= 4 * math.sqrt(probability * (1 - probability) / 20_000)
    assert torch.equal(sample.condition["label"][~dropped], batch["label"][~dropped])


def test_a_batch_without_labels_has_no_condition() -> None:
    assert noised({"x": torch.zeros(4, 2)}, noise_of(4), RectifiedFlow(), Uniform(), 0.5).condition is None


def test_time_noise_and_dropout_are_independent_and_of_the_law() -> None:
    sample = noised(batch_of(20_000), noise_of(20_000), RectifiedFlow(), Discrete(count=5), 0.5)
    shares = torch.bincount((4 * sample.t).long()) / 20_000
    assert len(shares) == 5 and (shares - 0.2).abs().max() < 4 * (0.16 / 20_000) ** 0.5
    dropped = (sample.condition["label"] == -1).float()
    correlation = torch.corrcoef(torch.stack([sample.t, sample.eps[:, 0], sample.eps[:, 1], dropped, sample.x0[:, 0]]))
    assert (correlation - torch.eye(5)).abs().max() < 4.5 / 20_000**0.5
    torch.testing.assert_close(sample.x_t, (1 - sample.t[:, None]) * sample.x0 + sample.t[:, None] * sample.eps)


def test_shares_of_the_noise_levels_sum_to_the_loss() -> None:
    ratio = torch.tensor([0.1, 0.3, 0.4, 1.0, 2.9, 3.1, 50.0, 0.0])  # sigma / alpha
    loss = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0], requires_grad=True)
    shares = loss_by_noise_level(loss, -2 * ratio.log())
    assert {name: 8 * value.item() for name, value in shares.items()} == {
        "loss_low_noise": 131,
        "loss_medium_noise": 28,
        "loss_high_noise": 96,
    }
    assert not any(value.requires_grad for value in shares.values())


def test_the_error_of_the_output_is_the_mean_square_given_the_label() -> None:
    """On the rectified flow the output's target is eps - x0; this network answers the label, and -1 without one."""
    sample = noised({**batch_of(6), "x": batch_of(6)["x"].double()}, noise_of(6), RectifiedFlow(), Uniform(), 0.0)

    def answer(x: torch.Tensor, t: torch.Tensor, condition: dict[str, torch.Tensor] | None) -> torch.Tensor:
        label = torch.full((len(x),), -1) if condition is None else condition["label"]
        return label[:, None].expand_as(x).double()

    expected = [((row - eps + x0) ** 2).mean() for row, eps, x0 in zip(sample.condition["label"], sample.eps, sample.x0, strict=True)]
    torch.testing.assert_close(output_error(Denoiser(answer, RectifiedFlow(), "velocity"), sample), torch.stack(expected).double())
