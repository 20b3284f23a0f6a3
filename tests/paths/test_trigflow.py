import math

import torch

from gentrain.paths.trigflow import TrigFlow


def test_path_is_a_rotation_that_keeps_the_deviation_of_the_data() -> None:
    path, t = TrigFlow(sigma_data=0.7), torch.linspace(0, math.pi / 2, 101, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t) ** 2 * 0.7**2 + path.sigma(t) ** 2, torch.full_like(t, 0.49))
    torch.testing.assert_close(path.perturb(torch.zeros(101, 1), torch.ones(101, 1), t)[-1].item(), 0.7)
    torch.testing.assert_close(path.network_time(t)[-1].item(), 1000.0)
