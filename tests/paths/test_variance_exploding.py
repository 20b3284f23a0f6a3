import pytest
import torch

from gentrain.paths.variance_exploding import VarianceExploding


def test_time_is_the_noise_level() -> None:
    torch.testing.assert_close(
        VarianceExploding().perturb(torch.ones(2, 1), torch.full((2, 1), -1.0), torch.tensor([0.002, 80.0])),
        torch.tensor([[0.998], [-79.0]]),
    )


def test_network_time_is_a_thousand_times_that_of_edm() -> None:
    sigma = torch.tensor([0.002, 1.0, 80.0])
    torch.testing.assert_close(VarianceExploding().network_time(sigma), 1000 * sigma.log() / 4)


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ValueError, match="must be below sigma_max"):
        VarianceExploding(sigma_min=1.0, sigma_max=1.0)
